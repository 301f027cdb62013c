"""Indexing, extremes, cumulative sums and sorting as JAX exports them: equal to JAX, or refused."""

from __future__ import annotations

import numpy as np
import pytest

import amx_tvm
from amx_tvm.errors import ModelError
from amx_tvm.frontends.importers.stablehlo import from_stablehlo

from .conftest import one_line

jax = pytest.importorskip("jax")
jnp = jax.numpy

X = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
X[0, 1] = X[0, 2]  # ties
X[2, 3, 1] = np.nan
IDS = np.array([[2, 0, 1, -1], [4, 9, 3, 1]], np.int32)
RIGHT = {
    **{
        f"take {mode} axis {axis}": lambda x, i, m=mode, a=axis: jnp.take(x, i, axis=a, mode=m)
        for mode in ("fill", "clip", "wrap")
        for axis in (0, 1, 2)
    },
    "index": lambda x, i: x[i % 3],
    "two indices": lambda x, i: x[i % 3, i % 5],
    "one number": lambda x, i: jnp.nan_to_num(x).mean() * i[0, 0],
    "columns": lambda x, i: (x[:, 1], x[:, :, 0], x[..., -1]),
    "labels": lambda x, i: (
        -jnp.take_along_axis(
            jax.nn.log_softmax(jnp.nan_to_num(x)[:, :, 0]), i[:1, :3].T % 5, axis=-1
        ).mean()
    ),
    "a batch of rows": lambda x, i: x[:, i % 5],
    "take_along_axis": lambda x, i: jnp.take_along_axis(x, jnp.argsort(x, axis=1)[:, :2], axis=1),
    "argmax": lambda x, i: jnp.argmax(x, -1),
    "argmin": lambda x, i: jnp.argmin(x, 1),
    "argmax of integers": lambda x, i: jnp.argmax(i, 0),
    "any and all": lambda x, i: (jnp.any(x > 0, -1), jnp.all(x > -1, 0)),
    "cumsum": lambda x, i: jnp.cumsum(jnp.nan_to_num(x), 1),
    "cumsum of integers": lambda x, i: jnp.cumsum(i, -1),
    "reverse cumsum": lambda x, i: jax.lax.cumsum(jnp.nan_to_num(x), 1, reverse=True),
    "cumprod": lambda x, i: jnp.cumprod(jnp.nan_to_num(x), 0),
    "sort": lambda x, i: jnp.sort(x, 1),
    "descending sort": lambda x, i: jnp.sort(x, 1, descending=True),
    "argsort": lambda x, i: jnp.argsort(x, 0),
    "sort with payload": lambda x, i: jax.lax.sort((i, i * 2), dimension=1, num_keys=1)[1],
    "top_k": lambda x, i: jax.lax.top_k(jnp.nan_to_num(x), 2),
    "clamp": lambda x, i: jnp.clip(jnp.nan_to_num(x), -0.5, 0.5),
}
REFUSED = {
    "stablehlo.reduce_window": lambda x: jax.lax.cummax(x, 1),
    "stablehlo.sort": lambda x: jax.lax.sort((x, x), dimension=1, num_keys=2)[1],
    "stablehlo.custom_call": lambda x: jnp.linalg.cholesky(x[:, :4] @ x[:, :4]),
    "stablehlo.scatter": lambda x: x.at[jnp.array([0, 1])].set(0.0),
    "stablehlo.gather": lambda x: jax.vmap(lambda row, j: row[j])(x, jnp.array([2, 0, 1])),
    "stablehlo.reduce": lambda x: jax.lax.reduce(
        (x, x), (0.0, 0.0), lambda a, b: (a[0] + b[0], a[1] * b[1]), (1,)
    ),
}


def exported(function, *arrays):
    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    return jax.export.export(jax.jit(function))(*specs).mlir_module()


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """Compile all cases as one function of many results; return each case's."""
    text = exported(lambda x, i: {name: f(x, i) for name, f in RIGHT.items()}, X, IDS)
    artifact = amx_tvm.compile(
        from_stablehlo(text), quantization="none", output=tmp_path_factory.mktemp("out") / "a"
    )
    results = amx_tvm.load(artifact.path, threads=1)(X, IDS)
    tree = jax.tree.structure({name: f(X, IDS) for name, f in RIGHT.items()})
    return jax.tree.unflatten(tree, [np.asarray(result) for result in results])


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_equals_jax(computed, name):
    expected = jax.tree.leaves(RIGHT[name](X, IDS))
    for got, wanted in zip(jax.tree.leaves(computed[name]), expected, strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got, np.asarray(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operation", sorted(REFUSED))
def test_other_forms_are_refused_by_name_and_line(operation):
    with pytest.raises(ModelError) as raised:
        from_stablehlo(exported(REFUSED[operation], X))
    message = one_line(raised.value)
    assert operation in message and "test_stablehlo_indexing.py" in message
