"""Images of requests: data: URIs always, files and addresses only where the server was told so.

A server that reads any address asks for things inside its own network on behalf of strangers. So
what may be asked for is named by its beginning, and nothing is followed anywhere else.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, build_opener

from amx_tvm.errors import AmxError, GenerationError
from amx_tvm.images import ImageSettings, PromptImage
from amx_tvm.images.reading import MOST_BYTES
from amx_tvm.server.errors import ApiError

_WAIT_S = 10.0  # for an address
MOST_IMAGES = 32  # of a request


class _Stay(HTTPRedirectHandler):
    """Follows nothing: what it leads to was not allowed."""

    def redirect_request(self, *_: Any) -> None:
        """Return no further request."""


@dataclass(frozen=True)
class ImageAccess:
    """Where images of requests may come from beside the requests themselves.

    Attributes
    ----------
    folder : Path or None
        Files in it may be named as file: URIs.
    urls : tuple of str
        Beginnings of addresses that are read, such as "https://images.example.com/".
    """

    folder: Path | None = None
    urls: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse a folder that is none, and an address whose host does not end in it."""
        if self.folder is not None and not self.folder.is_dir():
            raise AmxError(f"the folder of images {self.folder} does not exist; make it first")
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.netloc or not parts.path:
                raise AmxError(
                    f"images from {url!r} cannot be allowed; expected the beginning of addresses "
                    "with a host and a path, such as https://images.example.com/"
                )

    def read(self, url: str) -> bytes | Path:
        """Return the content of what a URL names, or the file that it is.

        Raises
        ------
        GenerationError
            For what is not allowed, not there, or too large.
        """
        kind = url.partition(":")[0].lower()
        if kind == "data":
            return _of_data(url)
        if kind == "file":
            return self._file(unquote(urlsplit(url).path))
        if kind in ("http", "https"):
            return self._fetched(url)
        raise GenerationError(
            f"an image's url is {url[:60]!r}, expected a data: URI (data:image/png;base64,...)"
        )

    def _file(self, name: str) -> Path:
        if self.folder is None:
            raise GenerationError("this server reads no files; send the image as a data: URI")
        root = self.folder.resolve()
        path = Path(name).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            raise GenerationError(f"{name!r} is no file that this server reads")
        return path

    def _fetched(self, url: str) -> bytes:
        if not url.startswith(self.urls or ("\0",)):
            raise GenerationError(
                f"this server does not read {url[:60]!r}; send the image as a data: URI"
            )
        try:
            with build_opener(_Stay, ProxyHandler({})).open(url, timeout=_WAIT_S) as answer:
                content = answer.read(MOST_BYTES + 1)
        except (OSError, URLError, ValueError) as error:
            raise GenerationError(f"the image {url[:60]!r} cannot be read: {error}") from None
        return bytes(content)

    def take(
        self,
        messages: Sequence[dict[str, Any]],
        settings: ImageSettings | None,
        token: str,
        param: str,
    ) -> tuple[PromptImage, ...]:
        """Return the images of messages, ready for the tower.

        Parameters
        ----------
        messages : sequence of dict
            Whose parts of type "image_url" name images.
        settings : ImageSettings or None
            Of the model.
        token : str
            The text of its token for images.
        param : str
            The field that holds the messages.

        Raises
        ------
        ApiError
            400, with the image's place, for one that cannot be had.
        """
        urls = {
            f"{param}[{row}].content[{column}].image_url": part["image_url"]["url"]
            for row, message in enumerate(messages)
            if isinstance(message.get("content"), list)
            for column, part in enumerate(message["content"])
            if part.get("type") == "image_url"
        }
        if len(urls) > MOST_IMAGES:
            raise GenerationError(
                f"the messages have {len(urls)} images, expected at most {MOST_IMAGES}"
            )
        made = []
        for place, url in urls.items():
            if settings is None:
                raise ApiError(400, "this model takes no images; leave them out", place)
            try:
                made.append(settings.prepare(self.read(url), token))
            except GenerationError as error:
                raise ApiError(400, str(error), place) from None
        return tuple(made)


def _of_data(url: str) -> bytes:
    head, comma, content = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise GenerationError(
            f"an image's url begins {url[:40]!r}, expected data:image/png;base64, and the content"
        )
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise GenerationError(f"an image's data: URI is no base64: {error}") from None
