"""Attention and row kernels, and that of ids, compiled without a GPU for every architecture."""

from __future__ import annotations

import re

import pytest

tvm = pytest.importorskip("tvm")

from cuda_compiled import ARCHITECTURES, compile_functions, needs_nvcc  # noqa: E402

from amx_tvm import formats  # noqa: E402
from amx_tvm.errors import ModelError  # noqa: E402
from amx_tvm.targets.cuda.gpus import gpu  # noqa: E402
from relax_passes.attention_spec import AttentionSpec, Rotation  # noqa: E402
from relax_passes.kernels.cuda.attention import cache, kernels  # noqa: E402
from relax_passes.kernels.cuda.attention.batch_text import FEW_WARPS, WARPS, Batches  # noqa: E402
from relax_passes.kernels.cuda.attention.config import Heads, check, page_elements  # noqa: E402
from relax_passes.kernels.cuda.attention.division import ROUNDS  # noqa: E402
from relax_passes.kernels.cuda.choose.ids import ids  # noqa: E402
from relax_passes.kernels.cuda.rows.kernels import row_kernel  # noqa: E402

pytestmark = needs_nvcc


def attention(arch: str, head_dim: int = 128, heads: int = 8, **more) -> dict:
    rotation = Rotation(tuple(1e4 ** (-2 * i / head_dim) for i in range(head_dim // 2)))
    spec = AttentionSpec(0, heads, 2, head_dim, 0.1, rotation=rotation, **more)
    batches = Batches(spec, (0, 64), gpu(arch))
    return {
        "decode_one": kernels.decode(spec, 2, arch),
        "plan": kernels.plan(batches),
        "batch": kernels.batch(spec, 2, batches),
        "store": kernels.store(spec, 2),
        "prefill": kernels.prefill(spec, 2, arch),
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_with_their_instructions(arch):
    functions = attention(arch) | {
        "rows": row_kernel(1024, None, norm_eps=1e-5, dependent=gpu(arch).clusters),
        "ids": ids(),
    }
    made = compile_functions(functions, arch)
    assert made.cubin[:4] == b"\x7fELF"
    text = made.ptx
    assert "mma.sync.aligned.m16n8k16" in text and "ldmatrix.sync" in text
    assert "cp.async.cg.shared.global" in text
    kernels_of = text.split(".entry ")[1:]
    decode = next(k for k in kernels_of if k.startswith("decode_one"))
    assert ("barrier.cluster.arrive" in decode) == gpu(arch).clusters
    assert ("griddepcontrol.wait" in decode) == gpu(arch).clusters
    assert not {k: v for k, v in made.resources().items() if v.spilled}


def test_state_is_an_argument_of_every_kernel_and_no_global():
    """Two engines of one library share its globals: none may be written."""
    store = cache.Store(4096, 100, 1024)
    functions = attention("sm_90a", 64) | {
        "begin": cache.first(store),
        "slots": cache.slots(),
        "rows": cache.sequences(),
        "list_prefill": cache.page_list(prefill=True),
        "list_decode": cache.page_list(prefill=False),
        "copy": cache.copy_page(4096),
    }
    text = compile_functions(functions, "sm_90a").ptx
    variables = re.findall(r"^\s*(?:\.visible )?\.(?:global|const) .*$", text, re.M)
    assert variables and all(" amx_frequencies_" in line for line in variables)
    for name in ("decode_one", "plan", "batch", "store", "prefill"):
        assert "state" in {p.name for p in functions[name].params}


@pytest.mark.slow
@pytest.mark.parametrize(
    "head_dim,heads,more",
    [
        (64, 16, {"sinks": True}),
        (96, 2, {}),
        (256, 4, {"soft_cap": 50.0}),
        (128, 32, {"norm_eps": 1e-6}),
        (100, 128, {}),
    ],
)
def test_other_heads_compile(head_dim, heads, more):
    made = compile_functions(attention("sm_90a", head_dim, heads, **more), "sm_90a")
    assert made.cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    "head_dim,group,stored,blocks",
    [(64, 8, 64, 8), (80, 4, 96, 4), (100, 16, 128, 16), (256, 64, 256, 16), (6, 17, 32, 1)],
)
def test_heads_lie_in_whole_pieces(head_dim, group, stored, blocks):
    """Channels are padded to 32; more than 16 queries of a kv head are several blocks'."""
    heads = Heads(AttentionSpec(0, 2 * group, 2, head_dim, 0.1))
    assert (heads.stored, heads.group, heads.blocks) == (stored, blocks, 2 * group // blocks)
    assert page_elements(heads.spec, 3) == 3 * 2 * 2 * 16 * stored


def test_a_kernel_of_sinks_takes_them():
    functions = attention("sm_90a", 100, 16, sinks=True)
    takes = {n: [p.name for p in f.params] for n, f in functions.items()}
    for name in ("decode_one", "batch", "prefill"):
        assert takes[name][2:5] == ["state", "sinks", "layer"]
    assert "sinks" not in takes["store"] and "sinks" not in takes["plan"]
    text = functions["prefill"].script()  # pages have 128 channels, the result has 100
    assert 'q: T.Buffer((m, 16, 128), "float16")' in text
    assert 'out: T.Buffer((m, 16, 100), "float16")' in text


def test_a_kernel_of_norms_of_heads_takes_their_weights():
    """Queries and keys are normalized where they are turned: not in what attends to a prompt."""
    functions = attention("sm_90a", 64, 16, sinks=True, norm_eps=1e-6)
    takes = {n: [p.name for p in f.params] for n, f in functions.items()}
    for name in ("decode_one", "batch"):
        assert takes[name][2:6] == ["state", "sinks", "q_norm", "k_norm"]
    assert takes["store"][2:5] == ["state", "q_norm", "k_norm"]
    assert "q_norm" not in takes["prefill"] + takes["plan"]


def test_few_sequences_have_blocks_of_more_warps():
    """As many items as their blocks fill the multiprocessors with, and no more blocks."""
    spec = AttentionSpec(0, 32, 8, 128, 0.1)
    batches = Batches(spec, (0,), gpu("sm_90a"))
    few, many = batches.slots(FEW_WARPS), batches.slots(WARPS)
    assert (few, many) == (132 // 8, 4 * 132 // 8)
    assert (batches.extra(FEW_WARPS), batches.extra(WARPS)) == (few, ROUNDS * many)
    text = kernels.batch(spec, 2, batches).script()
    first, second = text.split("if m <= ")[1].split("else:")
    assert first.startswith("T.int64(16)") or first.startswith("16")
    for part, warps in ((first, FEW_WARPS), (second, WARPS)):
        assert f'T.thread_binding({warps}, thread="threadIdx.y")' in part
    assert f", {many}, {few}, " in batches.plan().text


@pytest.mark.parametrize("head_dim,heads", [(258, 2), (33, 2), (64, 130)])
def test_heads_without_kernels_are_refused(head_dim, heads):
    with pytest.raises(ModelError, match=f"{heads} heads of {head_dim} channels.*a CPU"):
        check(AttentionSpec(0, heads, 2, head_dim, 0.1))


FOUR_BIT = [n for n in formats.names() if formats.get(n).rule]


@pytest.fixture(scope="module")
def rounding():
    """Row kernels of every four-bit format, compiled at once: which kernels, and what they use."""
    functions = {}
    for name in FOUR_BIT:
        normed = row_kernel(14336, 1, norm_eps=1e-6, format_name=name, dependent=True)
        word = name.replace("-", "_")
        functions[f"plain_{word}"] = row_kernel(576, None, format_name=name)
        functions[f"normed_{word}"] = normed
    return compile_functions(functions, "sm_90a").resources()


@pytest.mark.parametrize("name", FOUR_BIT)
def test_rounding_compiles_for_every_four_bit_format(rounding, name):
    word = name.replace("-", "_")
    for form in ("plain", "normed"):
        assert rounding[f"{form}_{word}_kernel"].spilled == 0


def test_rows_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        row_kernel(100, 1, norm_eps=1e-5)
