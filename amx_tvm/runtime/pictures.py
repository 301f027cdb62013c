"""Images in prompts: numbers that stand for their rows, and the rows, which the tower makes.

A row of an image is a token to everything that compares, forks or counts tokens: its number lies
behind the vocabulary, and rows of the same image have the same numbers for as long as the image is
remembered. So prompts share an image's keys and values as they share a text's. Only the step that
computes them replaces numbers by rows (`amx_tvm.models.step.with_given`).
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.images import ImageInput, ImageSettings, PromptImage
from amx_tvm.runtime.vm import VirtualMachine

if TYPE_CHECKING:
    from amx_tvm.runtime.request import Handle

_REMEMBERED = 256 << 20  # bytes of rows that are kept of images that no request has any more
_ROWS = 1024  # patches that the tower sees in one call, but for a tile that has more
_MOST = (1 << 31) - 1  # of a row's number


class Picture:
    """An image that prompts of an engine had.

    Attributes
    ----------
    first : int
        The number of its first row.
    rows : ndarray
        float32 [rows, hidden], of which those of ``seen`` tiles are made.
    error : Exception or None
        Why no more can be made.
    """

    def __init__(self, first: int, tiles: np.ndarray, rows: np.ndarray):
        self.first, self.tiles, self.rows = first, tiles, rows
        self.seen = 0
        self.error: Exception | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is left to be done for it."""
        return self.seen == len(self.tiles) or self.error is not None


class Pictures:
    """The images of an engine's prompts. Everything runs on the engine's thread.

    Parameters
    ----------
    machine : VirtualMachine
        Has the function ``see``.
    parameters : object
        The parameter tuple.
    settings : ImageSettings
        How images become rows.
    vocab_size : int
        How many tokens there are.
    hidden : int
        Features of a row.
    """

    def __init__(
        self,
        machine: VirtualMachine,
        parameters: Any,
        settings: ImageSettings,
        vocab_size: int,
        hidden: int,
    ):
        self._machine, self._parameters, self._settings = machine, parameters, settings
        self._see = machine.function("see")
        self._vocab, self._hidden = vocab_size, hidden
        self._next = vocab_size
        self._known: OrderedDict[bytes, Picture] = OrderedDict()
        self._numbered: WeakValueDictionary[int, Picture] = WeakValueDictionary()

    def place(self, handle: Handle) -> None:
        """Put the numbers of its images' rows into a new request's tokens."""
        tokens, settings = handle.tokens, self._settings
        places = [i for i, token in enumerate(tokens) if token == settings.token]
        start = 0
        for image in handle.request.images:
            picture = self._picture(image)
            for row, place in enumerate(places[start : start + len(picture.rows)]):
                tokens[place] = picture.first + row
            start += len(picture.rows)
            handle.pictures.append((picture, places[start - 1]))

    def _picture(self, image: PromptImage) -> Picture:
        """Return the picture of an image, which may be one that another prompt had."""
        known = self._known.get(image.digest)
        if known is None:
            rows = np.empty((len(image.tiles) * self._settings.rows, self._hidden), np.float32)
            if self._next + len(rows) > _MOST:
                raise GenerationError(
                    "this engine has seen more images than it has numbers for; load it again"
                )
            known = Picture(self._next, image.tiles, rows)
            self._numbered[self._next] = self._known[image.digest] = known
            self._next += len(rows)
            kept = sum(one.rows.nbytes for one in self._known.values())
            while kept > _REMEMBERED and len(self._known) > 1:
                kept -= self._known.popitem(last=False)[1].rows.nbytes
        self._known.move_to_end(image.digest)
        if known.error is not None:
            known.error = None  # another attempt
        return known

    def ready(self, active: list[Handle]) -> list[Handle]:
        """Return the requests that wait for no image; one call of the tower is made for others."""
        ready, looked = [], False
        for handle in active:
            done = len(handle.sequence.tokens)
            lacking = [p for p, last in handle.pictures if last >= done and not p.whole]
            if lacking and not looked:
                looked, start = True, time.perf_counter()
                self._look(lacking[0])
                handle.result.timings.image_s += time.perf_counter() - start
                lacking = [p for p in lacking if not p.whole]
            if not lacking:
                ready.append(handle)
        return ready

    def _look(self, picture: Picture) -> None:
        """Make the rows of an image's next tiles."""
        settings = self._settings
        count = max(1, _ROWS // settings.patches)
        tiles = picture.tiles[picture.seen : picture.seen + count]
        first = picture.seen * settings.rows
        try:
            patches = self._machine.to_device(settings.pixels(tiles))
            made = self._machine.to_host(self._see(patches, self._parameters))
            picture.rows[first : first + len(made)] = made
        except Exception as error:  # told to those whose step needs the rows
            picture.error = error
        else:
            picture.seen += len(tiles)

    def gather(self, tokens: Iterable[int]) -> tuple[np.ndarray, Any]:
        """Return a step's ids int32 [n] as ``forward_given`` takes them, and the table of rows."""
        ids = np.array(tokens, np.int64)
        places = np.flatnonzero(ids >= self._vocab)
        starts, rows = sorted(self._numbered), []
        for number in ids[places].tolist():
            picture = self._numbered[starts[bisect_right(starts, number) - 1]]
            if picture.error is not None:
                raise GenerationError(f"an image could not be seen: {picture.error}")
            rows.append(picture.rows[number - picture.first])
        ids[places] = self._vocab + np.arange(len(places))
        return ids.astype(np.int32), self._machine.to_device(np.stack(rows))


def prepared(
    settings: ImageSettings | None,
    prompt: Any,
    given: Sequence[ImageInput | PromptImage] | None,
    encode: Callable[[str], list[int]],
    token: Callable[[int], str],
) -> tuple[Any, tuple[PromptImage, ...]]:
    """Return a prompt as token ids, with as many as its images have rows, and the images.

    Parameters
    ----------
    settings : ImageSettings or None
        The model's; None where it takes no images.
    prompt : str or token ids
        A text has the image's token once for each; token ids have it once for each row.
    given : sequence of ImageInput or None
        The images, in the order of the prompt.
    encode, token : callable
        Encode a text; return a token's text.

    Raises
    ------
    GenerationError
        A model that takes no images, what is no image, or another number than the prompt has
        places for.
    """
    if given is None:
        given = ()
    if isinstance(given, str | bytes | dict) or not isinstance(given, Sequence):
        raise GenerationError(f"images are {given!r:.80}, expected a list of them")
    if settings is None:
        if len(given):
            raise GenerationError("this model takes no images; leave them out")
        return (encode(prompt) if isinstance(prompt, str) else prompt), ()
    text = token(settings.token) if isinstance(prompt, str) or len(given) else ""
    images = tuple(
        one if isinstance(one, PromptImage) else settings.prepare(one, text) for one in given
    )
    if isinstance(prompt, str):
        first, *rest = prompt.split(text)
        if len(rest) != len(images):
            raise GenerationError(
                f"the prompt has {len(rest)} places for images ({text}) and {len(images)} images "
                "were given; expected one each"
            )
        parts = [first, *(part for pair in zip(images, rest, strict=True) for part in _pair(pair))]
        return encode("".join(parts)), images
    ids = list(prompt)
    wanted = sum(len(image.tiles) * settings.rows for image in images)
    if ids.count(settings.token) != wanted:
        raise GenerationError(
            f"the prompt has the token {settings.token} {ids.count(settings.token)} times, and its "
            f"{len(images)} images have {wanted} rows; expected one each"
        )
    return ids, images


def _pair(pair: tuple[PromptImage, str]) -> tuple[str, str]:
    return pair[0].text, pair[1]
