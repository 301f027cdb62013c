"""What is opened as an image, and what is refused with which words."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import tiny_vision
from PIL import Image

from amx_tvm.errors import AmxError, GenerationError
from amx_tvm.images import reading
from amx_tvm.images.reading import opened
from amx_tvm.runtime.pictures import prepared
from amx_tvm.server.images import ImageAccess


def encoded(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def closed(image):
    image.close()
    return image


def test_files_bytes_arrays_and_pillows_images_are_the_same(tmp_path):
    image = tiny_vision.picture(9, 7)
    (tmp_path / "a.png").write_bytes(encoded(image))
    for given in (image, np.asarray(image), encoded(image), tmp_path / "a.png"):
        np.testing.assert_array_equal(np.asarray(opened(given)), np.asarray(image))


def test_what_is_transparent_lies_on_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert np.asarray(opened(clear)).min() == 255
    assert opened(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_photographs_stand_as_the_camera_was_held():
    image, turn = tiny_vision.picture(9, 7), Image.Exif()
    turn[0x0112] = 6
    content = encoded(image, exif=turn)
    for given in (content, Image.open(BytesIO(content))):
        assert opened(given).size == (7, 9)


def test_sixteen_bits_become_eight():
    """Pillow's own conversion cuts them off: whatever is above 255 would be white."""
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) << 8
    graymap = b"P5\n16 16\n65535\n" + ramp.astype(">u2").tobytes()
    image = Image.fromarray(ramp)
    for given in (image, encoded(image), encoded(image, "TIFF"), graymap):
        np.testing.assert_array_equal(np.asarray(opened(given))[..., 1], ramp >> 8)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_picture_of_an_animation(kind):
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    content = encoded(first, kind, save_all=True, append_images=[second])
    red, _, blue = opened(content).getpixel((1, 1))
    assert red > 200 and blue < 50


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"no image", "an image is no image that is read; expected one of PNG, JPEG"),
        (encoded(tiny_vision.picture(90, 70))[:400], r"an image is no image that is read \("),
        (Image.open(BytesIO(encoded(tiny_vision.picture(90, 70))[:400])), "no image that is read"),
        (closed(tiny_vision.picture(90, 70)), "an image is damaged"),
        (Image.fromarray(np.ones((2, 2), np.float32)), "has 32 bits a pixel, whose range is not"),
        (np.zeros((0, 5, 3), np.uint8), "an image has 5 x 0 pixels, expected from 1 to"),
        ("/nowhere/a.png", "the image /nowhere/a.png cannot be read"),
        (np.zeros((2, 2)), r"an image is an array float64 \[2, 2\], expected uint8"),
        (7, "an image is a int, expected a file's name"),
    ],
)
def test_what_is_no_image(given, message):
    with pytest.raises(GenerationError, match=message):
        opened(given)


def test_what_is_too_large(monkeypatch, tmp_path):
    content = encoded(tiny_vision.picture(90, 70))
    (tmp_path / "a.png").write_bytes(content)
    monkeypatch.setattr(reading, "MOST_PIXELS", 6299)
    with pytest.raises(GenerationError, match="90 x 70 pixels, expected from 1 to 6299"):
        opened(content)
    monkeypatch.setattr(reading, "MOST_BYTES", len(content) - 1)
    for given in (content, tmp_path / "a.png"):
        with pytest.raises(GenerationError, match="bytes, expected at most .* make it smaller"):
            opened(given)


def test_prompts_and_images_fit_each_other(made):
    engine, image = made.engine, tiny_vision.picture(64, 64)
    for prompt, images, message in [
        ("w5", [image], r"has 0 places for images \(<image>\) and 1 images were given"),
        ("w5<image>", [], "has 1 places for images .* and 0 images"),
        ([5, 6], [image], "has the token 100 0 times, and its 1 images have"),
        ("<image>", "a.png", "images are 'a.png', expected a list"),
        ("<image>", [Image.new("RGB", (401, 2))], "401 x 2 pixels, .* none is longer than 200"),
    ]:
        with pytest.raises(GenerationError, match=message):
            engine.request(prompt, images=images)
    with pytest.raises(GenerationError, match="this model takes no images; leave them out"):
        prepared(None, "w5", [image], list, str)


def test_what_a_server_reads(tmp_path):
    content, folder = encoded(tiny_vision.picture(9, 7)), tmp_path / "seen"
    folder.mkdir()
    (folder / "a b.png").write_bytes(content)
    (tmp_path / "secret.png").write_bytes(content)
    closed, access = ImageAccess(), ImageAccess(folder, ("http://127.0.0.1:9/images/",))
    assert access.read((folder / "a b.png").as_uri()) == folder / "a b.png"
    for given, url, message in [
        (closed, "data:image/png;base64,=", "is no base64"),
        (closed, "data:image/png,abc", "begins 'data:image/png,abc', expected data:image/png;ba"),
        (closed, "a.png", "url is 'a.png', expected a data: URI"),
        (closed, "file:///etc/passwd", "reads no files; send the image as a data: URI"),
        (closed, "http://127.0.0.1/", "does not read 'http://127.0.0.1/'"),
        (access, "file:///etc/passwd", "is no file that this server reads"),
        (access, f"{folder.as_uri()}/../secret.png", "is no file that this server reads"),
        (access, "http://127.0.0.1:9/other", "does not read 'http://127.0.0.1:9/other'"),
        (access, "http://127.0.0.1:9/images/a", "cannot be read"),
    ]:
        with pytest.raises(GenerationError, match=message):
            given.read(url)
    for wrong in (ImageAccess(tmp_path / "no"), ImageAccess(urls=("https://host",))):
        with pytest.raises(AmxError, match="does not exist|a host and a path"):
            wrong.check()
