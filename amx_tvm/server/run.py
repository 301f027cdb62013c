"""Serve until told to stop: uvicorn around the application, a language model in its own process."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

import uvicorn

from amx_tvm.runtime import EmbeddingEngine, Engine
from amx_tvm.server.address import Address
from amx_tvm.server.apart import Keeper, through
from amx_tvm.server.app import Server
from amx_tvm.server.core import Drive
from amx_tvm.server.embeddings import EmbeddingServer
from amx_tvm.server.service import Service, Settings

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Draining(uvicorn.Server):
    """Listens while answers end, so that what is new is told so, and stops then."""

    def __init__(self, config: uvicorn.Config, server: Service, drain_s: int, signals: bool):
        super().__init__(config)
        self._server, self._drain_s, self._signals = server, drain_s, signals
        self._ends: float | None = None  # when the last answer has to have ended

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take signals, unless another process does and tells of them."""
        with super().capture_signals() if self._signals else nullcontext():
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end at the first signal; end at the second, at once for SIGINT."""
        super().handle_exit(sig, frame)
        if self._ends is not None:
            self._ends = time.monotonic()
            self.force_exit |= sig == signal.SIGINT
            return
        self._ends = time.monotonic() + self._drain_s
        self.should_exit = False
        self._server.drain()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the application too where uvicorn would leave it to be cancelled."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop listening; uvicorn asks ten times a second."""
        if self._ends is not None:
            left = self._ends - time.monotonic()
            if left <= 0:
                self._server.end()
            if self._server.idle or left <= 0:
                self.config.timeout_graceful_shutdown = max(1, round(left))
                self.should_exit = True
        return await super().on_tick(counter)


class _Front:
    """What speaks HTTP: it listens until it is told to stop, or the engine fails."""

    def __init__(self, settings: Settings, address: Address):
        self._settings, self._address = settings, address
        self._failed = False
        self._server: _Draining

    def run(self, engine: Engine | EmbeddingEngine, drive: Drive | None = None) -> int:
        """Serve; return the process's exit code. With ``drive`` another process has the engine."""
        application: Service
        if isinstance(engine, EmbeddingEngine):
            application = EmbeddingServer(engine, self._settings)
        else:
            application = Server(engine, self._settings, self._died, drive)
        address = self._address
        config = uvicorn.Config(
            application.app,
            host=address.host,
            port=address.port,
            ssl_certfile=address.certificate,
            ssl_keyfile=address.private_key,
            access_log=False,
            log_level="warning",
        )
        self._server = _Draining(config, application, address.drain_s, signals=drive is None)
        self._server.run()
        return 1 if self._failed else 0

    def stop(self, sig: int) -> None:
        """Take a signal that another process got."""
        self._server.handle_exit(sig, None)

    def _died(self, error: BaseException) -> None:
        logging.getLogger("amx_tvm.server").error("the engine failed: %s", error)
        self._failed = True
        self._server.should_exit = True
        self._server.force_exit = True


def serve(engine: Engine | EmbeddingEngine, settings: Settings, address: Address) -> int:
    """Serve an engine until SIGINT or SIGTERM; return the process's exit code.

    A language model on CPUs has a process of its own. On GPUs the engine's Python is hidden behind
    steps that the device has ahead, and a driver's state does not pass a fork.
    """
    front = _Front(settings, address)
    apart = isinstance(engine, Engine) and engine.manifest.target.device == "cpu"
    if apart:
        _ = engine.tokenizer  # both processes have it
    gc.collect()  # what is there stays: collections that look at all of it hold streams up
    gc.freeze()
    if not apart:
        # uvicorn raises the signal that ended it once more when all is done: the code is ours.
        signal.signal(signal.SIGTERM, lambda *_: None)
        return front.run(engine)
    assert isinstance(engine, Engine)
    own, other = socket.socketpair()
    child = os.fork()
    if child:
        other.close()
        return _keep(engine, settings.limits.kept, own, child)
    code = 1
    try:
        own.close()
        for sig in _SIGNALS:  # the other process tells of them
            signal.signal(sig, signal.SIG_IGN)
        code = front.run(engine, through(other, front.stop))
    except SystemExit as end:  # uvicorn's, which has said why
        code = end.code if isinstance(end.code, int) else 1
    except Exception:
        logging.getLogger("amx_tvm.server").exception("the server failed")
    finally:  # nothing above this frame is the front's to run
        logging.shutdown()
        os._exit(code)


def _keep(engine: Engine, kept: int, end: socket.socket, front: int) -> int:
    """Run an engine for a front until that ends; return its exit code, which is not 0 for ours."""
    keeper = Keeper(engine, kept, end)
    keeper.pass_on(_SIGNALS)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(front, keeper.cores())
    keeper.run()
    _, status = os.waitpid(front, 0)
    engine.close()
    return max(os.waitstatus_to_exitcode(status), 0) or int(os.WIFSIGNALED(status))
