"""Serve until told to stop: uvicorn around the application."""

from __future__ import annotations

import gc
import logging
import signal
import time
from dataclasses import dataclass
from types import FrameType

import uvicorn

from amx_tvm.runtime import EmbeddingEngine, Engine
from amx_tvm.server.app import Server
from amx_tvm.server.embeddings import EmbeddingServer
from amx_tvm.server.service import Service, Settings


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes
    ----------
    host, port : str, int
        The address; 127.0.0.1 is reached from this machine only.
    certificate, private_key : str, optional
        Files in PEM form: HTTPS.
    drain_s : float
        Seconds that answers under way get to end when the server is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: str | None = None
    private_key: str | None = None
    drain_s: int = 60


class _Draining(uvicorn.Server):
    """Listens while answers end, so that what is new is told so, and stops then."""

    def __init__(self, config: uvicorn.Config, server: Service, drain_s: int):
        super().__init__(config)
        self._server, self._drain_s = server, drain_s
        self._ends: float | None = None  # when the last answer has to have ended

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end at the first signal; end at the second, at once for SIGINT."""
        super().handle_exit(sig, frame)
        if self._ends is not None:
            self.force_exit |= sig == signal.SIGINT
            return
        self._ends = time.monotonic() + self._drain_s
        self.should_exit = False
        self._server.drain()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop listening; uvicorn asks ten times a second."""
        if self._ends is not None:
            left = self._ends - time.monotonic()
            if self._server.idle or left <= 0:
                self.config.timeout_graceful_shutdown = max(1, round(left))
                self.should_exit = True
        return await super().on_tick(counter)


def serve(engine: Engine | EmbeddingEngine, settings: Settings, address: Address) -> int:
    """Serve an engine until SIGINT or SIGTERM; return the process's exit code."""
    failed: list[BaseException] = []

    def died(error: BaseException) -> None:
        logging.getLogger("amx_tvm.server").error("the engine failed: %s", error)
        failed.append(error)
        server.should_exit = True
        server.force_exit = True

    # uvicorn raises the signal that ended it once more when all is done: the exit code is ours.
    signal.signal(signal.SIGTERM, lambda *_: None)
    application: Service
    if isinstance(engine, EmbeddingEngine):
        application = EmbeddingServer(engine, settings)
    else:
        application = Server(engine, settings, died)
    config = uvicorn.Config(
        application.app,
        host=address.host,
        port=address.port,
        ssl_certfile=address.certificate,
        ssl_keyfile=address.private_key,
        access_log=False,
        log_level="warning",
    )
    server = _Draining(config, application, address.drain_s)
    gc.collect()  # what is there stays: collections that look at all of it hold streams up
    gc.freeze()
    server.run()
    return 1 if failed else 0
