"""Artifacts of kind "function": called with arrays, parameters bound, several results."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import amx_tvm.runtime
from amx_tvm.artifact import ArtifactWriter, Manifest, TargetRecord, Versions
from amx_tvm.errors import ArtifactError, GenerationError
from amx_tvm.runtime.library import installed_versions

WEIGHT = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def build(path, weights):
    """main(x[, params]) = x @ w, pair the same and its negative, twice(s[, params]) = s + s."""
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    for name in ("main", "pair"):
        x = relax.Var("x", relax.TensorType((3, 4), "float32"))
        kind = relax.TensorType((4, 6), "float32")
        given = relax.Var("params", relax.TupleType([kind]))
        with builder.function(name, [x, given] if weights else [x]):
            weight = relax.TupleGetItem(given, 0) if weights else relax.const(WEIGHT)
            y = builder.emit(relax.op.matmul(x, builder.emit(weight)))
            result = relax.Tuple([y, builder.emit(relax.op.negative(y))]) if name == "pair" else y
            builder.emit_func_output(result)
    number = relax.Var("s", relax.TensorType((), "float32"))
    kind = relax.TupleType([relax.TensorType((4, 6), "float32")])
    with builder.function("twice", [number, relax.Var("params", kind)] if weights else [number]):
        builder.emit_func_output(builder.emit(relax.op.add(number, number)))
    with ArtifactWriter(path) as writer:
        executable = tvm.compile(builder.get(), tvm.target.Target({"kind": "llvm"}))
        executable.export_library(str(writer.path("lib.so")))
        if weights:
            writer.parameters.add("w", WEIGHT)
        writer.finish(
            Manifest(
                versions=Versions("0", *installed_versions()),
                target=TargetRecord("llvm-test", "llvm", ""),
                library=writer.library(),
                parameters=writer.parameters.finish(),
                model={"name": "product"},
                functions=["main", "pair", "twice"],
                kind="function",
            )
        )
    return amx_tvm.runtime.load(path)


@pytest.fixture(scope="module", params=[True, False], ids=["parameters", "constants"])
def product(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("function") / "artifact", request.param)


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)


def test_call(product, x):
    np.testing.assert_allclose(product(x), x @ WEIGHT, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(product(np.asfortranarray(x)), x @ WEIGHT, rtol=1e-5, atol=1e-6)


def test_several_results(product, x):
    first, second = product(x, function="pair")
    np.testing.assert_allclose(first, x @ WEIGHT, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(second, -first)


@pytest.mark.parametrize("value", [np.float32(1.5), np.array(1.5, np.float32)], ids=["0", "array"])
def test_numbers_without_dimensions(product, value):
    result = product(value, function="twice")
    assert result.shape == () and result == 3.0


def test_threads_take_turns(product, x):
    """TVM's virtual machine has no lock, and who calls it keeps a pool of TVM's threads."""

    def worst(factor):
        found = [product(x * factor) for _ in range(300)]
        return max(abs(one - x @ WEIGHT * factor).max() for one in found)

    product(x)
    threads = set(os.listdir("/proc/self/task"))
    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(worst, range(1, 9))) < 1e-4
    end = time.monotonic() + 10  # those that have been joined may still be listed for a moment
    while not (now := set(os.listdir("/proc/self/task"))) <= threads and time.monotonic() < end:
        time.sleep(0.05)
    assert now <= threads


def test_a_forked_child_may_call(product, x):
    expected = product(x)
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        os._exit(int(np.any(product(x) != expected)))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_torch_tensor_without_a_copy(product, x):
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(product(torch.from_numpy(x)), product(x))


class Elsewhere:
    """An array that says that it is on a GPU."""

    shape, dtype = (3, 4), "float32"

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **_):
        raise BufferError("not to be read")


def test_an_array_of_another_device_is_refused(product):
    with pytest.raises(GenerationError, match="input 0 is on cuda:0, the engine on the CPU"):
        product(Elsewhere())


def test_unknown_function(product, x):
    with pytest.raises(ArtifactError, match="'sum'.*main, pair, twice"):
        product(x, function="sum")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((np.zeros((4, 4), "f4"),), ["input x is float32 (4, 4)", "(3, 4)"]),
        ((np.zeros((3, 4), "f8"),), ["float64", "float32"]),
        ((np.zeros((3, 4, 1), "f4"),), ["(3, 4, 1)"]),
        ((7,), ["input x is int"]),
        ((), ["takes 1 inputs, given were 0"]),
        ((np.zeros((3, 4), "f4"),) * 2, ["takes 1 inputs, given were 2"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_inputs_are_named(product, inputs, words):
    with pytest.raises(GenerationError) as caught:
        product(*inputs)
    for word in words:
        assert word in str(caught.value)


def test_command_line_says_it_is_no_language_model(product):
    from amx_tvm.cli.generate_command import load_engine

    with pytest.raises(GenerationError, match="compiled function"):
        load_engine(product.path, {})


def test_a_replaced_library_gets_another_name(tmp_path):
    """The dynamic linker takes a known name for the library that it has loaded under it."""
    from amx_tvm.runtime.vm import _name_of

    path = tmp_path / "lib.so"
    path.write_bytes(b"first")
    first = _name_of(path)
    assert first == str(path) == _name_of(path)
    newer = tmp_path / "newer.so"
    newer.write_bytes(b"second, of another length")
    newer.replace(path)
    second = _name_of(path)
    assert second != first and Path(second).read_bytes() == path.read_bytes()
