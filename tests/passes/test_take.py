"""relax.take: the loops of TVM's own rule."""

from __future__ import annotations

import pytest
from tvm import relax, tirx

from relax_passes.take import take

CASES = [((5,), 0, (7, 3)), ((2, 3), 1, (4, 6, 5)), ((), 0, (7, 3)), (("n",), -1, (3, 8))]


@pytest.mark.parametrize("mode", ["fast", "clip"])
@pytest.mark.parametrize(("indices", "axis", "data"), CASES, ids=str)
def test_same_function_as_tvm(indices, axis, data, mode, capfd):
    free = tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType(list(data), "float32"))
    shape = [free if size == "n" else size for size in indices]
    i = relax.Var("i", relax.TensorType(shape, "int32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, i]):
        with builder.dataflow():
            result = builder.emit_output(relax.op.take(x, i, axis, mode=mode))
        builder.emit_func_output(result)
    module = builder.finalize()
    ours = relax.transform.LegalizeOps({"relax.take": take})(module).script()
    assert capfd.readouterr().err == ""
    assert ours == relax.transform.LegalizeOps()(module).script()
