"""A remote measuring process in which some knobs make kernels that end or stop their session."""

from __future__ import annotations

import sys
from pathlib import Path

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

sys.path.append(str(Path(__file__).parent))  # workers do not search the folder of their script

from faulty_worker import CRASH, HANG  # noqa: E402

from tuning.remote_worker import RemoteServer  # noqa: E402
from tuning.worker import serve  # noqa: E402


class FaultyServer(RemoteServer):
    """Kernels of two prefetch distances call abort() and pause() of the C library."""

    def compiled(self, contender):
        call = {CRASH: "abort", HANG: "pause"}.get(contender["prefetch"])
        if call is None:
            return super().compiled(contender)
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name("f")
                for name, shape, dtype in self.spec.buffers():
                    T.arg(name, T.Buffer([1 if n is None else n for n in shape], dtype))
                T.evaluate(tvm.tirx.call_extern("int32", call))
        return tvm.compile(tvm.IRModule({"f": builder.get()}), self.target)


if __name__ == "__main__":
    serve(FaultyServer(sys.argv[1], sys.argv[2], float(sys.argv[3])))
