"""Streams of events over connections that take them, that are full, and that fail."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest

from amx_tvm.server.answer import Answer
from amx_tvm.server.errors import ApiError
from amx_tvm.server.news import Piece
from amx_tvm.server.stream import EventStream


class Core:
    """Takes requests and gives their pieces when it is told to."""

    cancelled = False

    def submit(self, requests, deliver):
        self.deliver = deliver
        return list(range(len(requests)))

    def cancel(self, _numbers):
        self.cancelled = True


class Request:
    stream = 0


class Says:
    """Events that are the text of pieces, in brackets."""

    def __init__(self, answer):
        self.answer = answer

    async def opening(self):
        return b"opening"

    def of(self, index, piece):
        if piece.text == "broken":
            raise ValueError("broken")
        return f"{index}:{piece.text}".encode() if piece.text else b""

    def closing(self):
        return b"closing"

    def failed(self, error):
        return f"failed: {error}".encode()


class Connection:
    """An ASGI connection whose ``send`` waits while it is full, behind ``takes`` events."""

    def __init__(self, takes=10**6):
        self.sent, self.drained = [], asyncio.Event()
        self._takes = takes
        self._numbers = count()

    async def send(self, message):
        if message["type"] == "http.response.body" and message["body"]:
            if next(self._numbers) == self._takes:
                await self.drained.wait()
            self.sent.append(message["body"].decode())

    async def receive(self):
        await asyncio.Event().wait()


def streamed(script, choices=1, takes=10**6):
    """Run a script beside a stream; return its events, its status, and the core."""

    async def run():
        core, connection, statuses = Core(), Connection(takes), []
        answer = Answer(core, [Request()] * choices)
        answer.start()
        stream = EventStream(Says(answer), statuses.append)
        task = asyncio.ensure_future(stream({}, connection.receive, connection.send))
        while not connection.sent:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        try:
            await script(core.deliver, connection)
            await asyncio.wait_for(task, 5)
        finally:
            task.cancel()
        return connection.sent, statuses, core

    return asyncio.run(run())


def test_pieces_are_written_within_the_call_that_brings_them():
    async def script(deliver, connection):
        for number in range(3):
            deliver(0, Piece(f"a{number}", [number]))
            deliver(1, Piece(f"b{number}", [number]))
            assert connection.sent[-2:] == [f"0:a{number}", f"1:b{number}"]
        deliver(0, Piece("", [3]))  # a token whose text is held back
        deliver(0, Piece("end", [4], finish_reason="stop"))
        deliver(1, Piece("b3", [4]))
        deliver(1, Piece("", [], finish_reason="length"))

    sent, statuses, core = streamed(script, choices=2)
    assert sent[0] == "opening" and sent[-1] == "closing" and statuses == [200]
    told = "".join(sent[7:-1])
    assert told in ("0:end1:b3", "1:b30:end") and not core.cancelled


def test_a_reader_that_lags_gets_pieces_joined():
    async def script(deliver, connection):
        for number in range(6):
            deliver(0, Piece(f"{number},", [number]))
            await asyncio.sleep(0.001)
        assert connection.sent == ["opening", "0:0,"]
        connection.drained.set()
        await asyncio.sleep(0.001)
        deliver(0, Piece("6,", [6]))
        assert connection.sent[-1] == "0:6,"  # at once again
        deliver(0, Piece("7", [7], finish_reason="stop"))

    sent, statuses, _ = streamed(script, takes=2)
    assert sent == ["opening", "0:0,", "0:1,", "0:2,3,4,5,", "0:6,", "0:7", "closing"]
    assert statuses == [200]


def test_a_defect_ends_its_own_stream():
    async def script(deliver, _connection):
        deliver(0, Piece("broken", [1]))  # raises nothing here: others get their pieces

    with pytest.raises(ValueError, match="broken"):
        streamed(script)


def test_an_error_is_the_last_event():
    async def script(deliver, _connection):
        deliver(0, Piece("a", [1]))
        deliver(0, Piece("b", [2], finish_reason="error", error=ApiError(500, "no luck")))

    sent, statuses, core = streamed(script)
    assert sent == ["opening", "0:a", "failed: no luck"]
    assert statuses == [500] and not core.cancelled
