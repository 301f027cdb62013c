"""The engine in a process apart from the front: both halves' Python then runs at the same time.

The process that loaded the engine keeps it and makes the front by a fork: weights, tokenizer and
library are there once, and the front uses of the engine what reads and checks requests only.
Pickled messages go both ways through a pair of sockets, which closes when either side ends.

The front makes text of tokens, except for answers with stop strings: whether those end is the
engine's to know.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import select
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

from amx_tvm.runtime import Engine
from amx_tvm.runtime.request import Request
from amx_tvm.runtime.stream import Detokenizer
from amx_tvm.server.core import Drive, Driver
from amx_tvm.server.crank import Crank
from amx_tvm.server.errors import ApiError, ServerError
from amx_tvm.server.grammar import Form, Forms
from amx_tvm.server.masks import Mask
from amx_tvm.server.news import News, Piece

_SIZE = 4  # bytes of a message's length, in front of it
_READ = 1 << 18
_LOOK_S = 1.0  # seconds after which the engine's thread is looked at

log = logging.getLogger("amx_tvm.server")


def _framed(message: Any) -> bytes:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(_SIZE, "little") + data


class _Frames:
    """Messages out of bytes that come in any parts."""

    def __init__(self) -> None:
        self._held = bytearray()

    def of(self, data: bytes) -> Iterator[Any]:
        """Yield what is complete with these bytes."""
        self._held += data
        start, held = 0, self._held
        while len(held) >= (begin := start + _SIZE):
            end = begin + int.from_bytes(held[start:begin], "little")
            if len(held) < end:
                break
            yield pickle.loads(memoryview(held)[begin:end])
            start = end
        del held[:start]


class _Text:
    """The text of one answer without stop strings, made of its tokens."""

    def __init__(self, request: Request):
        self._ends = request.stop_tokens
        self._decoder = Detokenizer(request.tokenizer, request.prompt)

    def add_to(self, piece: Piece) -> None:
        """Put into a piece what is certain with its tokens; with the last one all that is left."""
        parts = [self._decoder.add(token) for token in piece.tokens if token not in self._ends]
        if piece.finish_reason is not None and piece.error is None:
            parts.append(self._decoder.flush())
        piece.text += "".join(parts)


class Remote(asyncio.Protocol):
    """The front's end: the engine's side as `Core` calls it.

    Parameters
    ----------
    arrived : callable
        Called in the event loop with the News of a step.
    stop : callable
        Called with a signal that the engine's process got.
    """

    def __init__(self, arrived: Callable[[News], None], stop: Callable[[int], None]):
        self.alive = True
        self._arrived, self._stop = arrived, stop
        self._frames = _Frames()
        self._texts: dict[int, _Text] = {}
        self._transport: Any

    def connection_made(self, transport: Any) -> None:
        """Keep the way to the other process."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take what the other process tells."""
        for message in self._frames.of(data):
            if isinstance(message, News):
                for number, piece in message.pieces.items():
                    if number in self._texts:
                        self._add_text(number, piece)
                self._arrived(message)
            else:
                self._stop(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everybody who waits that the engine is gone."""
        self.alive = False
        self._arrived(News(error=ServerError("the engine's process has ended")))

    def _add_text(self, number: int, piece: Piece) -> None:
        """Put a piece's text into it."""
        try:
            self._texts[number].add_to(piece)
        except Exception:  # of this answer alone
            log.exception("an answer's tokens are no text")
            piece.finish_reason = "error"
            piece.error = ApiError(500, "this answer failed: the server's log says why")
            self.cancel([number])
        if piece.finish_reason is not None:
            self._texts.pop(number, None)

    def add(self, requests: dict[int, Request]) -> None:
        """Start requests soon."""
        for number, request in requests.items():
            if request.tokenizer is not None and not request.limits.stop:
                self._texts[number] = _Text(request)
        self._send(Keeper.add, {number: _stripped(one) for number, one in requests.items()})

    def score(self, number: int, prompt: list[int], count: int, adapter: str | None) -> None:
        """Score a prompt soon."""
        self._send(Keeper.score, number, prompt, count, adapter)

    def cancel(self, numbers: Sequence[int]) -> None:
        """End what has these numbers soon."""
        for number in numbers:
            self._texts.pop(number, None)
        self._send(Keeper.cancel, list(numbers))

    def _send(self, method: Callable[..., None], *arguments: Any) -> None:
        """Have the other process call a method."""
        if self.alive:
            self._transport.write(_framed((method, arguments)))


_Asked = tuple[Request, bool, Form | None]  # a request, whether text may end it, and its form


def _stripped(request: Request) -> _Asked:
    """Return what the other process can make a request of again."""
    form = request.mask.form if isinstance(request.mask, Mask) else None
    reads = request.tokenizer is not None and bool(request.limits.stop)
    return replace(request, tokenizer=None, mask=None), reads, form


def through(end: socket.socket, stop: Callable[[int], None]) -> Drive:
    """Return what drives an engine of the process at the other end."""

    async def drive(arrived: Callable[[News], None]) -> Driver:
        loop = asyncio.get_running_loop()
        _, remote = await loop.connect_accepted_socket(lambda: Remote(arrived, stop), end)
        return remote

    return drive


class Keeper:
    """The engine's end of the process that has it.

    Parameters
    ----------
    engine : Engine
        The model.
    kept : int
        How many of its sequences are for ended answers.
    end : socket
        The way to the front.
    """

    def __init__(self, engine: Engine, kept: int, end: socket.socket):
        self._engine, self._end = engine, end
        self._noted, self._note = socket.socketpair()  # signals, a byte each
        self._sending = Lock()
        self._forms = Forms(engine)
        self._crank = Crank(engine, kept, self._post)

    def cores(self) -> set[int]:
        """Return the cores that the front may run on.

        TVM binds its workers to cores each. Where they leave a single one, the engine's own thread
        has that, and its Python is what the front's is to run beside.
        """
        allowed = os.sched_getaffinity(0)
        each = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
        bound = set().union(*(own for own in each if len(own) == 1 < len(allowed)))
        return bound if len(allowed - bound) == 1 else allowed

    def pass_on(self, signals: Sequence[int]) -> None:
        """Tell the front of signals from now on.

        A handler only notes its signal: it may run while this thread sends, and within itself.
        """
        self._note.setblocking(False)
        signal.set_wakeup_fd(self._note.fileno(), warn_on_full_buffer=False)
        for sig in signals:
            signal.signal(sig, lambda *_: None)

    def run(self) -> None:
        """Do what the front asks for until either has ended."""
        frames = _Frames()
        while self._crank.alive:
            ready = select.select([self._end, self._noted], [], [], _LOOK_S)[0]
            if self._noted in ready:
                for sig in self._noted.recv(_READ):
                    self.tell(sig)
            if self._end not in ready:
                continue
            try:
                data = self._end.recv(_READ)
            except OSError:
                data = b""
            if not data:
                break
            for method, arguments in frames.of(data):
                method(self, *arguments)
        self._end.close()

    def add(self, asked: dict[int, _Asked]) -> None:
        """Start requests soon."""
        made = {}
        for number, one in asked.items():
            try:
                made[number] = self._made(*one)
            except Exception as error:  # of this request alone
                self._crank.refuse(number, error)
        self._crank.add(made)

    def _made(self, request: Request, reads: bool, form: Form | None) -> Request:
        """Return a request with what the front cannot send."""
        tokenizer = self._engine.tokenizer if reads else None
        mask = self._forms.matcher(form).mask() if form is not None else None
        return replace(request, tokenizer=tokenizer, mask=mask)

    def score(self, number: int, prompt: list[int], count: int, adapter: str | None) -> None:
        """Score a prompt soon."""
        self._crank.score(number, prompt, count, adapter)

    def cancel(self, numbers: list[int]) -> None:
        """End what has these numbers soon."""
        self._crank.cancel(numbers)

    def tell(self, message: Any) -> None:
        """Send the front a message; nothing where it has ended."""
        data = _framed(message)
        with self._sending:
            try:
                self._end.sendall(data)
            except OSError:
                pass

    def _post(self, news: News) -> None:
        for number, found in news.scores.items():
            if isinstance(found, Exception):
                news.scores[number] = ServerError(str(found))  # which any process can read
        if news.error is not None:
            news.error = ServerError(str(news.error))
        self.tell(news)
