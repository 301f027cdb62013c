"""TVM's RPC server on a device, with TVM's runtime alone; what `amx-tvm device-server` starts.

The compiler library is never loaded (TVM_USE_RUNTIME_LIB), so any board with TVM's runtime will do.
Each session is a process of its own: a kernel that crashes or hangs ends with it.

TVM quirk (0.27): after a session's process crashed, the server's loop ends in a RuntimeError and
the device stays away from the tracker; `_surviving` lets it go on.

Whoever reaches the port can run code here: at another address than 127.0.0.1 only in networks that
you trust.
"""

from __future__ import annotations

import json
import os
from typing import Any

PORTS = 200


def run(tracker: str, key: str, host: str, port: int, threads: int | None, address: str) -> None:
    """Serve until the process is ended.

    Parameters
    ----------
    tracker : str
        HOST:PORT of ``python -m tvm.exec.rpc_tracker``.
    key : str
        Kind of device, such as "pi4"; the tuner asks for it.
    host, port : str, int
        Address to listen at, and the first port to try.
    threads : int, optional
        Threads of a kernel; by default TVM's choice.
    address : str
        The address that the tracker tells tuners, where it is not the one that it sees.
    """
    os.environ["TVM_USE_RUNTIME_LIB"] = "1"
    if threads is not None:
        os.environ["TVM_NUM_THREADS"] = str(threads)
    import tvm_ffi
    from tvm.rpc import server as engine

    from tuning.host import host as description

    text = json.dumps(description())
    tvm_ffi.register_global_func("amx.device.host", lambda: text, override=True)
    engine._serving = _surviving(engine._serving, engine.logger)
    name, _, number = tracker.rpartition(":")
    state = engine.PopenRPCServerState(
        host,
        port,
        port + PORTS,
        tracker_addr=(name, int(number)),
        key=key,
        custom_addr=address or None,
    )
    print(f"serving {key} on port {state.port} for the tracker {tracker}", flush=True)
    state.thread.join()


def _surviving(serving: Any, logger: Any) -> Any:
    """Wrap TVM's session function: a session that crashed is logged, and the next one served."""

    def survive(sock: Any, *arguments: Any) -> None:
        where = os.getcwd()
        try:
            serving(sock, *arguments)
        except RuntimeError as error:
            logger.warning("%s; serving on", error)
            os.chdir(where)
            sock.close()

    return survive
