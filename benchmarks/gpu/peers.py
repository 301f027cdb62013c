"""The peers of the GPU benchmark: cuBLAS in bfloat16 and other libraries' linears of 4-bit weights.

Which of them are timed depends on what is importable; PEERS lists them all:

- cuBLAS through torch: bfloat16 weights.
- tinygemm, inside torch: int4, groups of 128.
- bitsandbytes: FP4, blocks of 64, through matmul_4bit, which picks a kernel by M.
- gemlite, written in Triton: int4, groups of 128, with the configurations that it ships for the
  GPU. They are for one kernel by M (see `gemlite_kernel`), and a shape without any, the head, takes
  those of the nearest N. On a GPU for which it ships none it is not timed: its defaults are up to
  30 times slower (measured on an H100), and its tuning takes 12 s for every shape and M.
- humming (humming-kernels on PyPI): MXFP4. Compiles with nvrtc, by its own rules of thumb.
- triton_kernels, the folder python/triton_kernels of Triton's repository, in the version with
  `matmul_ogs` (Triton 3.5 and 3.6; the package of this name on PyPI is another one): MXFP4 as one
  expert, bfloat16 activations.

Every peer packs weights of its own format; its result is compared with the dense float32 product of
what those weights stand for, on fresh x and with two of the copies, before it is timed.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import harness

Tensor = torch.Tensor

INT4_GROUP = 128


@dataclass(frozen=True)
class Linear:
    """A peer's packed weights of one shape.

    dense : float32 [N, K], what they stand for
    copies : packed weights, as often as it takes to exceed the L2 cache
    launch : of one copy and x [rows, K] to a new y [rows, N], both of `dtype`
    tolerance : largest relative error of a right result; W and y are rounded to `dtype`
    """

    dense: Tensor
    copies: list
    launch: Callable[[Any, Tensor], Tensor]
    dtype: torch.dtype
    tolerance: float


@dataclass(frozen=True)
class Peer:
    """One entry of the table.

    module : what has to be importable
    distribution : whose version results name
    build : makes a Linear of the shape of a dense float32 [N, K], of these or of random values
    most_rows : more rows are not timed, because of `reason`
    """

    name: str
    module: str
    distribution: str
    build: Callable[[Tensor], Linear]
    most_rows: int | None = None
    reason: str = ""


def copies(weights: Any, nbytes: int) -> list:
    """The weights and as many deep copies as it takes to exceed the L2 cache."""
    return [weights] + [copy.deepcopy(weights) for _ in range(harness.copies(nbytes) - 1)]


def random_int4(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, K] of 0..15, scales [N, K / 128] and dense float32 (code - 8) * scale."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(n, k // INT4_GROUP, device="cuda") * 0.01 + 0.005).to(dtype)
    dense = codes.view(n, -1, INT4_GROUP).float().sub_(8).mul_(scales.float()[..., None])
    return codes, scales, dense.view(n, k)


def random_mxfp4(n: int, k: int, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """MXFP4 codes uint8 [N, K / 2], E8M0 scales uint8 [N, K / 32] and dense float32 [N, K].

    The low four bits of a byte are the even column's.
    """
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    scales = torch.randint(127 - 9, 127 - 5, (n, k // 32), dtype=torch.uint8, device=device)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=device)
    grid = torch.cat((grid, -grid))
    dense = torch.empty(n, k, device=device)
    dense[:, 0::2] = grid[(codes & 15).int()]
    dense[:, 1::2] = grid[(codes >> 4).int()]
    dense.view(n, -1, 32).mul_(torch.exp2(scales.float() - 127)[..., None])
    return codes, scales, dense


def build_cublas(dense: Tensor) -> Linear:
    weight = dense.to(torch.bfloat16)
    return Linear(
        weight.float(),
        copies(weight, 2 * weight.numel()),
        lambda weight, x: torch.mm(x, weight.T),
        torch.bfloat16,
        1e-2,
    )


def build_tinygemm(dense: Tensor) -> Linear:
    codes, scales, dense = random_int4(*dense.shape, torch.bfloat16)
    pairs = (codes[:, 0::2] << 4 | codes[:, 1::2]).contiguous()
    packed = torch._convert_weight_to_int4pack(pairs, 8)
    # scale and zero point by group: [K / 128, N, 2]; here code 8 already stands for 0
    scales_zeros = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous()
    return Linear(
        dense,
        copies((packed, scales_zeros), dense.numel() // 2),
        lambda w, x: torch._weight_int4pack_mm(x, w[0], INT4_GROUP, w[1]),
        torch.bfloat16,
        1e-2,
    )


def build_bitsandbytes(dense: Tensor) -> Linear:
    import bitsandbytes
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(dense, blocksize=64, quant_type="fp4")
    return Linear(
        functional.dequantize_4bit(packed, state),
        copies((packed, state), dense.numel() // 2),
        lambda w, x: bitsandbytes.matmul_4bit(x, w[0], quant_state=w[1]),
        torch.float16,
        3e-3,
    )


def gemlite_kernel(rows: int) -> str:
    """The kernel for which gemlite ships a configuration."""
    if rows == 1:
        return "GEMV_REVSPLITK"
    return "GEMM_SPLITK" if rows <= 64 else "GEMM"


def borrow_configurations(shipped: dict[str, dict[str, dict]], n: int, k: int) -> None:
    """Give a shape without configurations those of the nearest N with the same K.

    shipped : gemlite's {kernel: {"(M, N, K, group, elements in a word, types)": configuration}}
    """
    for configurations in shipped.values():
        keys = [tuple(int(v) for v in key.strip("()").split(",")) for key in configurations]
        near = {key[1] for key in keys if key[2:4] == (k, INT4_GROUP)}
        if near and n not in near:
            nearest = min(near, key=lambda other: abs(other - n))
            for key in keys:
                if key[1:4] == (nearest, k, INT4_GROUP):
                    borrowed = (key[0], n, *key[2:])
                    configurations[str(borrowed)] = configurations[str(key)]


def build_gemlite(dense: Tensor) -> Linear:
    import gemlite
    from gemlite.helper import A16W4_HQQ_INT

    n, k = dense.shape
    shipped = gemlite.core.GEMLITE_TRITON_CONFIG_CACHE
    if not shipped:
        raise RuntimeError("gemlite ships no configurations for this GPU")
    borrow_configurations(shipped, n, k)
    codes, scales, dense = random_int4(n, k, torch.float16)
    packer = A16W4_HQQ_INT(device="cuda", dtype=torch.float16)
    layer = packer.from_weights(codes, scales, torch.full_like(scales, 8))
    return Linear(
        dense,
        copies(layer, dense.numel() // 2),
        lambda layer, x: layer.forward_manual(x, gemlite_kernel(x.shape[0])),
        torch.float16,
        1e-2,  # for one row it adds up K / 16 parts of y in float16: 2.4e-3 at K = 4096
    )


def build_humming(dense: Tensor) -> Linear:
    from humming.layer import HummingLayer

    n, k = dense.shape
    codes, scales, dense = random_mxfp4(n, k)
    layer = HummingLayer(n, k, {"quant_method": "mxfp4"}, torch_dtype=torch.float16).cuda()
    layer.load_from_tensors({"weight": codes, "weight_scale": scales})
    layer.transform()
    return Linear(
        dense, copies(layer, dense.numel() // 2), lambda layer, x: layer(x), torch.float16, 3e-3
    )


def build_triton(dense: Tensor) -> Linear:
    from triton_kernels.matmul_ogs import PrecisionConfig, matmul_ogs
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    codes, scales, dense = random_mxfp4(*dense.shape)
    kind, options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    # [1 expert, K, N] with K contiguous
    weight = convert_layout(wrap_torch_tensor(codes.T[None], dtype=FP4), kind, **options)
    configurations = {}
    for warps in (4, 8):  # the scales' layout depends on the kernel's warps
        kind, options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=warps)
        swizzled = convert_layout(wrap_torch_tensor(scales.T[None]), kind, **options)
        configurations[warps] = PrecisionConfig(weight_scale=swizzled, out_dtype=torch.bfloat16)

    def launch(packed, x: Tensor) -> Tensor:
        weight, configurations = packed
        warps = 4 if x.shape[0] <= 512 else 8  # as Triton's own benchmark has it
        return matmul_ogs(x, weight, None, precision_config=configurations[warps])

    weights = copies((weight, configurations), dense.numel() // 2)
    return Linear(dense, weights, launch, torch.bfloat16, 1e-2)


PEERS = (
    Peer("cuBLAS bf16", "torch", "torch", build_cublas),
    Peer(
        "tinygemm int4",
        "torch",
        "torch",
        build_tinygemm,
        128,
        "not timed above 128 rows: it reads and decodes W for every 16 of them",
    ),
    Peer("bitsandbytes fp4", "bitsandbytes", "bitsandbytes", build_bitsandbytes),
    Peer("gemlite int4 (Triton)", "gemlite", "gemlite", build_gemlite),
    Peer("humming mxfp4", "humming", "humming-kernels", build_humming),
    Peer("triton_kernels mxfp4", "triton_kernels.matmul_ogs", "triton_kernels", build_triton),
)


def find(peer: Peer) -> dict[str, str]:
    """{"version": ...} of a peer that is importable, else {"failure": why it is not}."""
    try:
        importlib.import_module(peer.module)
    except Exception as error:  # a library may refuse a machine with any of them
        return {"failure": f"not importable: {brief(error)}"}
    try:
        return {"version": importlib.metadata.version(peer.distribution)}
    except importlib.metadata.PackageNotFoundError:
        return {"version": "unknown"}


def brief(error: Exception) -> str:
    """One line about an error."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def check(linear: Linear, rows: int) -> float:
    """Largest relative error of the first and the last copy, each with its own x; NaN if any."""
    errors = []
    for weights in (linear.copies[0], linear.copies[-1]):
        x = torch.randn(rows, linear.dense.shape[1], device="cuda", dtype=linear.dtype)
        y = linear.launch(weights, x)
        expected = x.float() @ linear.dense.T
        errors.append((y.float() - expected).norm() / expected.norm())
    return float(torch.stack(errors).max())


def time_linear(linear: Linear, rows: int, burst: bool) -> harness.Times:
    """Time one launch with weights from device memory."""
    x = torch.randn(rows, linear.dense.shape[1], device="cuda", dtype=linear.dtype)
    count = len(linear.copies)
    launch = lambda i: linear.launch(linear.copies[i % count], x)  # noqa: E731
    return harness.graph_time(launch, max(count, 4), burst)


def measure(peer: Peer, dense: Tensor, rows: list[int], burst: bool) -> list[dict]:
    """Pack, check and time a peer's linear for every number of rows.

    One result for each, with "us" where it is right, else with "failure" or the error alone.
    """
    results: list[dict] = [{"rows": m, "peer": peer.name} for m in rows]
    few = [r for r in results if peer.most_rows is None or r["rows"] <= peer.most_rows]
    for result in results:
        if result not in few:
            result["failure"] = peer.reason
    try:
        linear = peer.build(dense)
    except Exception as error:
        for result in few:
            result["failure"] = brief(error)
        return results
    for result in few:
        try:
            result["error_relative"] = check(linear, result["rows"])
            if result["error_relative"] < linear.tolerance:
                result |= time_linear(linear, result["rows"], burst).named()
        except Exception as error:
            result["failure"] = brief(error)
    return results
