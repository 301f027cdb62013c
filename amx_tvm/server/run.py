"""Serve until told to stop: uvicorn around the application."""

from __future__ import annotations

import gc
import logging
import signal
from dataclasses import dataclass

import uvicorn

from amx_tvm.runtime import Engine
from amx_tvm.server.app import Server, Settings


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


def serve(engine: Engine, settings: Settings, address: Address) -> int:
    """Serve an engine until SIGINT or SIGTERM; return the process's exit code."""
    failed: list[BaseException] = []

    def died(error: BaseException) -> None:
        logging.getLogger("amx_tvm.server").error("the engine failed: %s", error)
        failed.append(error)
        server.should_exit = True
        server.force_exit = True

    # uvicorn raises the signal that ended it once more when all is done: the exit code is ours.
    signal.signal(signal.SIGTERM, lambda *_: None)
    config = uvicorn.Config(
        Server(engine, settings, died).app,
        host=address.host,
        port=address.port,
        ssl_certfile=address.certificate,
        ssl_keyfile=address.private_key,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=address.drain_s,
    )
    server = uvicorn.Server(config)
    gc.collect()  # what is there stays: collections that look at all of it hold streams up
    gc.freeze()
    server.run()
    return 1 if failed else 0
