"""How fast a server answers: tokens a second, time to the first token, time between tokens.

Any server with OpenAI's /v1/completions will do. Each stream is a thread of this process, so what
the client itself takes of the machine is part of the figures; where server and client share few
cores, `python -m benchmarks.serving` tells the two apart.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from amx_tvm.errors import AmxError

_WORDS = (
    "the harbour was built by people who traded in timber and salt and wrote it all down".split()
)
_PATIENCE = 600.0  # seconds without a byte


@dataclass(frozen=True)
class Load:
    """What was asked of a server, and what it gave.

    Attributes
    ----------
    streams : int
        Answers under way at once.
    requests : int
        Answers in all.
    prompt_tokens, new_tokens : int
        Of all answers, as the server counts them.
    tokens_per_s : float
        New tokens of all streams.
    first_token_s, between_tokens_s : dict of str to float
        "p50", "p95" and "p99" in seconds; a chunk with several tokens counts as one.
    """

    streams: int
    requests: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_s: float
    first_token_s: dict[str, float]
    between_tokens_s: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return asdict(self)


def measure(
    url: str, streams: int, prompt: int = 128, tokens: int = 128, repeats: int = 4, key: str = ""
) -> Load:
    """Ask a server for ``repeats`` answers on each of a number of streams.

    Parameters
    ----------
    url : str
        The server's address, with or without /v1.
    streams : int
        Answers under way at once.
    prompt : int
        Words of a prompt; each begins differently, so that no prefix is cached.
    tokens : int
        New tokens of an answer.
    repeats : int
        Answers of a stream, one after another.
    key : str
        API key, where the server asks for one.

    Raises
    ------
    AmxError
        The address is none, or an answer failed.
    """
    answers: list[_Answer] = []
    failed: list[Exception] = []

    def stream(index: int) -> None:
        try:
            for turn in range(repeats):
                words = [f"{index}", f"{turn}", f"{time.time_ns()}"]
                words += [_WORDS[(index + turn + i) % len(_WORDS)] for i in range(prompt)]
                answers.append(_ask(url, " ".join(words[: max(prompt, 3)]), tokens, key))
        except Exception as error:
            failed.append(error)

    _ask(url, "warm up", 2, key)
    threads = [threading.Thread(target=stream, args=(i,)) for i in range(streams)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if failed:
        raise failed[0]
    gaps = [gap for answer in answers for gap in np.diff(answer.times)]
    return Load(
        streams,
        len(answers),
        sum(answer.prompt_tokens for answer in answers),
        sum(answer.new_tokens for answer in answers),
        sum(answer.new_tokens for answer in answers) / seconds,
        _percentiles([answer.times[0] - answer.start for answer in answers if answer.times]),
        _percentiles(gaps),
    )


@dataclass
class _Answer:
    start: float
    times: list[float]
    prompt_tokens: int = 0
    new_tokens: int = 0


def _ask(url: str, prompt: str, tokens: int, key: str) -> _Answer:
    """Stream one answer."""
    address = urlsplit(url if "://" in url else f"http://{url}")
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if address.scheme not in kinds or not address.hostname:
        raise AmxError(f"the server is {url!r}, expected an address such as http://127.0.0.1:8000")
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    route = address.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
    connection = kinds[address.scheme](address.hostname, address.port, timeout=_PATIENCE)
    try:
        answer = _Answer(time.perf_counter(), [])
        connection.request("POST", route, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise AmxError(f"{url} answered {response.status}: {response.read(500).decode()}")
        for line in response:
            if line.startswith(b"data: ") and line[6:].strip() != b"[DONE]":
                _take(answer, json.loads(line[6:]))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise AmxError(f"{url} gave no answer: {error}; is a server listening there?") from None
    finally:
        connection.close()
    return answer


def _take(answer: _Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        raise AmxError(f"an answer failed: {event['error']}")
    if event.get("choices"):
        answer.times.append(time.perf_counter())
    usage = event.get("usage")
    if usage:
        answer.prompt_tokens = int(usage["prompt_tokens"])
        answer.new_tokens = int(usage["completion_tokens"])


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    found = np.percentile(values, (50, 95, 99)) if values else np.zeros(3)
    return {name: float(v) for name, v in zip(("p50", "p95", "p99"), found, strict=True)}
