"""The page to chat at, in a real Chromium; skipped where there is none, or no Playwright."""

from __future__ import annotations

import time

import pytest
from serving import serving

pytestmark = pytest.mark.slow  # `make test-browser`


@pytest.fixture(scope="module")
def slow(browser, artifact):
    """A server whose answers end with the context, ``seconds`` a step."""
    with serving(artifact) as running:
        running.engine.manifest.model["eos_token_ids"] = []
        scheduler = running.server.core._crank._scheduler
        step = scheduler.step

        def slowly():
            time.sleep(running.seconds)
            return step()

        running.seconds = 0.0

        scheduler.step = slowly
        yield running


@pytest.fixture
def page(browser, slow):
    context = browser.new_context(viewport={"width": 1100, "height": 750})
    page = context.new_page()
    page.set_default_timeout(90_000)
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(slow.url)
    yield page
    assert not wrong
    assert all(url.startswith((slow.url, "data:")) for url in asked)  # no network but the server
    context.close()


@pytest.fixture
def slowly(slow):
    """While a test runs, an answer takes longer than anything that it does."""
    slow.seconds = 0.2
    yield
    slow.seconds = 0.0


def send(page, text):
    page.locator("#text").fill(text)
    page.keyboard.press("Enter")
    page.locator("article.assistant").last.wait_for()


def answer(page):
    return page.locator("article.assistant .text").last


def text_that_grows(page):
    """Wait until an answer is there and see it grow."""
    page.wait_for_function(
        "document.querySelector('article.assistant:last-child .text')?.textContent"
    )
    first = answer(page).text_content()
    page.wait_for_function(
        "n => document.querySelector('article.assistant:last-child .text').textContent.length > n",
        arg=len(first),
    )
    return first


def ended(page):
    page.locator("#send").wait_for(state="visible")


def test_streams_stops_and_regenerates(page, slow, slowly):
    send(page, "the cat")
    first = text_that_grows(page)
    page.locator("#stop").click()
    ended(page)
    assert answer(page).text_content().startswith(first)
    assert "stopped" in page.locator("article.assistant footer").text_content()
    slow.free_pages()  # the server has noticed
    page.get_by_role("button", name="Regenerate").click()
    text_that_grows(page)
    assert page.locator("article").count() == 2
    page.keyboard.press("Escape")
    ended(page)


def test_edits_and_keeps_conversations(page):
    send(page, "the dog")
    ended(page)
    note = page.locator("article.assistant").text_content()
    assert "tokens/s, first after" in note and "limit of tokens" in note
    page.get_by_role("button", name="Edit").click()
    assert page.locator("article").count() == 0
    assert page.locator("#text").input_value() == "the dog"
    send(page, "the lazy dog")
    ended(page)
    said = answer(page).text_content()
    page.locator("#new").click()
    assert page.locator("article").count() == 0
    page.reload()
    page.locator("#list button", has_text="the lazy dog").first.click()
    assert page.locator("article.user .text").text_content() == "the lazy dog"
    assert answer(page).text_content() == said
    page.get_by_role("button", name="Delete the lazy dog").click()
    assert page.locator("#list button", has_text="the lazy dog").count() == 0


def test_settings_reach_the_server(page):
    page.locator("#settings summary").click()
    page.locator("#system").fill("be brief")
    page.locator("#max_tokens").fill("3")
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "the fox")
    body = asked.value.post_data_json
    assert body["max_tokens"] == 3 and body["messages"][0] == {
        "role": "system",
        "content": "be brief",
    }
    ended(page)
    page.reload()
    assert page.locator("#system").input_value() == "be brief"


def test_keyboard_alone(page, slowly):
    page.locator("#text").focus()
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    assert page.locator("#text").input_value() == "a\nb"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    page.keyboard.press("Enter")
    page.locator("#stop").wait_for(state="visible")
    page.keyboard.press("Escape")
    ended(page)
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.textContent.trim()"))
    assert {"New conversation", "Settings", "Regenerate", "Edit"} <= seen


def test_a_phone_and_the_dark(page):
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert light != dark
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.locator("#side").is_visible() and page.locator("#send").is_visible()
    page.locator("#menu").click()
    assert page.locator("#new").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#side").is_visible()
    send(page, "the mat " * 10)
    ended(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_an_error_is_shown(page):
    send_text = "the cat sat on the mat " * 300
    page.locator("#text").fill(send_text)
    page.keyboard.press("Enter")
    page.locator("article .wrong").wait_for()
    assert "context is 256" in page.locator("article .wrong").text_content()
