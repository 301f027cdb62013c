"""Tuning one kernel: python examples/tune_kernel.py [ROWS COLUMNS TRIALS].

It needs the extra `tune`. `amx-tvm tune MODEL` does so for all kernels of a model.
"""

import sys
import tempfile

from amx_tvm.targets import resolve
from relax_passes.activation import INT8
from relax_passes.spec import LinearSpec
from tuning.measure import Worker
from tuning.session import Session
from tuning.tasks import Task

if __name__ == "__main__":  # a worker is another process
    n, k, trials = map(int, sys.argv[1:4] or (512, 512, 6))
    spec = LinearSpec("amxfp4", n, k, activation=INT8, m=1)
    with tempfile.TemporaryDirectory() as records, Worker("llvm", 60.0) as worker:
        session = Session([Task(spec, "linear", 1, 0)], resolve("llvm"), records, [worker])
        try:
            (state,) = session.run(None, trials)
        finally:
            session.close()
        record = state.record
    if record is None:
        print(f"{session.trials} trials: nothing is quicker than the default")
    else:
        print(f"{session.trials} trials; kept: {record.knobs}")
