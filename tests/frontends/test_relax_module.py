"""A Relax module as a model source."""

from __future__ import annotations

import numpy as np
import pytest
from tvm.script import ir as I
from tvm.script import relax as R

from amx_tvm.errors import ModelError
from amx_tvm.frontends import ModelSource, open_model
from amx_tvm.frontends.importers.relax_module import RelaxModuleSource

from .conftest import one_line


@I.ir_module
class Linear:
    @R.function
    def main(
        x: R.Tensor(("n", 8), "float32"),
        w: R.Tensor((4, 8), "float32"),
        b: R.Tensor((4,), "float16"),
    ) -> R.Tensor(("n", 4), "float32"):
        with R.dataflow():
            y = R.matmul(x, R.permute_dims(w))
            z = R.add(y, R.astype(b, "float32"))
            R.output(z)
        return z


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "w": rng.standard_normal((4, 8)).astype(np.float32),
        "b": rng.standard_normal(4).astype(np.float16),
    }


def test_weights_and_inputs(params):
    source = RelaxModuleSource(Linear, params, name="linear")
    assert isinstance(source, ModelSource) and open_model(source) is source
    assert source.kind == "function" and source.name == "linear"
    assert source.names() == ["w", "b"] and source.inputs == ["x"]
    assert source.shape("w") == (4, 8) and source.dtype("b") == "float16"
    assert source.nbytes == 4 * 8 * 4 + 4 * 2
    for name, values in source:
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, params[name].astype(np.float32))
    assert source.array("b").dtype == np.float16
    assert source.write_tokenizer("nowhere") == []


def test_tensors_of_other_libraries(params):
    torch = pytest.importorskip("torch")
    import tvm

    given = {"w": torch.from_numpy(params["w"]), "b": tvm.runtime.tensor(params["b"])}
    source = RelaxModuleSource(Linear, given)
    for name in params:
        np.testing.assert_array_equal(source.array(name), params[name])


def test_digest_follows_weights_and_module(params):
    first = RelaxModuleSource(Linear, params).digest()
    assert first == RelaxModuleSource(Linear, params).digest()
    assert first != RelaxModuleSource(Linear, {**params, "w": params["w"] + 1}).digest()
    assert first != RelaxModuleSource(Linear, {}).digest()


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("v", np.zeros(3, np.float32), ["'v'", "x, w, b"]),
        ("w", np.zeros((4, 9), np.float32), ["[4, 9]", "[4, 8]"]),
        ("w", np.zeros(4, np.float32), ["[4]", "[4, 8]"]),
        ("w", np.zeros((4, 8)), ["float64", "float32"]),
        ("x", np.zeros((3, 9), np.float32), ["[3, 9]", "['?', 8]"]),
        ("w", "text", ["numbers"]),
    ],
)
def test_weights_that_do_not_fit(name, value, parts):
    with pytest.raises(ModelError) as caught:
        RelaxModuleSource(Linear, {name: value})
    assert all(part in one_line(caught.value) for part in parts)


def test_symbolic_size_takes_any_length():
    assert RelaxModuleSource(Linear, {"x": np.zeros((3, 8), np.float32)}).inputs == ["w", "b"]


def test_missing_entry():
    with pytest.raises(ModelError, match="no Relax function 'forward'.*main"):
        RelaxModuleSource(Linear, {}, entry="forward")
