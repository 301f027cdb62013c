"""Other people's matrix products as callables: llama.cpp's ggml, ONNX Runtime, torch.

Each factory returns ``call(i)``, which multiplies by the i-th copy of the weights, or raises
ImportError / OSError where the peer is not installed. Weights are random; what is compared is time.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

Call = Callable[[int], object]
GGML_TYPES = {"q4_0": 2, "q4_k": 12, "mxfp4": 39, "bf16": 30}
GGML_BITS = {"q4_0": 4.5, "q4_k": 4.5, "mxfp4": 4.25, "bf16": 16.0}


class _Ggml:
    """The part of ggml's C interface that one product needs, through ctypes."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ImportError("llama-cpp-python is not installed")
        folder = Path(spec.origin).parent / "lib"
        for name in ("libggml-base.so", "libggml-cpu.so", "libggml.so"):
            setattr(
                self,
                name[3:-3].replace("-", "_"),
                ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL),
            )

    def __call__(self, name: str, *args: object, restype: object = ctypes.c_void_p) -> object:
        for library in (self.ggml_base, self.ggml_cpu, self.ggml):
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype = restype
                return function(
                    *[ctypes.c_void_p(a) if isinstance(a, int) and a > 2**31 else a for a in args]
                )
        raise OSError(f"ggml has no function {name}")


LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_QUIET = LogCallback(lambda _level, _text, _data: None)  # kept alive: ggml holds the pointer


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


def ggml_linear(n: int, k: int, m: int, threads: int, copies: int, kind: str) -> Call:
    """llama.cpp's product of float32 activations with a quantized weight, repacked as it loads."""
    g = _Ggml()
    wide = ctypes.c_int64
    g.ggml_base.ggml_log_set(_QUIET, None)

    def context() -> int:
        g.ggml_base.ggml_init.argtypes = [_InitParams]
        g.ggml_base.ggml_init.restype = ctypes.c_void_p
        return g.ggml_base.ggml_init(_InitParams(64 << 20, None, True))

    backend = g("ggml_backend_cpu_init")
    g("ggml_backend_cpu_set_n_threads", backend, ctypes.c_int(threads), restype=None)
    weights = context()
    type_ = GGML_TYPES[kind]
    tensors = [
        g("ggml_new_tensor_2d", weights, ctypes.c_int(type_), wide(k), wide(n))
        for _ in range(copies)
    ]
    buffer = _repack_buffer(g, backend, weights) or g(
        "ggml_backend_alloc_ctx_tensors", weights, backend
    )
    if not buffer:
        raise OSError("ggml did not allocate the weights")
    size = g("ggml_nbytes", tensors[0], restype=ctypes.c_size_t)
    dense = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
    packed = (ctypes.c_char * size)()
    g("ggml_quantize_chunk", ctypes.c_int(type_), dense.ctypes.data_as(ctypes.c_void_p), packed,
      wide(0), wide(n), wide(k), None, restype=ctypes.c_size_t)  # fmt: skip
    for t in tensors:
        g(
            "ggml_backend_tensor_set",
            t,
            packed,
            ctypes.c_size_t(0),
            ctypes.c_size_t(size),
            restype=None,
        )
    work = context()
    x = g("ggml_new_tensor_2d", work, ctypes.c_int(0), wide(k), wide(m))
    graphs = []
    for t in tensors:
        graph = g("ggml_new_graph", work)
        g("ggml_build_forward_expand", graph, g("ggml_mul_mat", work, t, x), restype=None)
        graphs.append(graph)
    g("ggml_backend_alloc_ctx_tensors", work, backend)
    values = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
    g("ggml_backend_tensor_set", x, values.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(0),
      ctypes.c_size_t(values.nbytes), restype=None)  # fmt: skip
    compute = g.ggml_base.ggml_backend_graph_compute
    compute.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return lambda i: compute(backend, graphs[i])


def _repack_buffer(g: _Ggml, backend: int, weights: int) -> int | None:
    """Allocate weights in the interleaved layout that llama.cpp uses when it loads a model."""
    device = g("ggml_backend_get_device", backend)
    registry = g("ggml_backend_dev_backend_reg", device)
    address = g("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    list_types = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    types = list_types(device)
    for i in range(8):
        if not types[i]:
            return None
        name = g("ggml_backend_buft_name", types[i], restype=ctypes.c_char_p)
        if b"REPACK" in name:
            return g("ggml_backend_alloc_ctx_tensors_from_buft", weights, types[i])
    return None


def onnx_linear(n: int, k: int, m: int, threads: int, copies: int) -> Call:
    """ONNX Runtime's MatMulNBits, four bits in blocks of 32, int8 accumulation."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    sessions = []
    for _ in range(copies):
        codes = rng.integers(0, 256, (n, k // 32, 16), dtype=np.uint8)
        scales = rng.uniform(0.01, 0.02, n * (k // 32)).astype(np.float32)
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
            K=k, N=n, bits=4, block_size=32, accuracy_level=4,
        )  # fmt: skip
        graph = helper.make_graph(
            [node],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
            [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scales, "s")],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        sessions.append(ort.InferenceSession(model.SerializeToString(), options))
    x = rng.standard_normal((m, k)).astype(np.float32)
    return lambda i: sessions[i].run(None, {"x": x})


def torch_linear(n: int, k: int, m: int, threads: int, copies: int) -> Call:
    """torch's linear on bfloat16."""
    import torch

    torch.set_num_threads(threads)
    weights = [torch.randn(n, k).bfloat16() for _ in range(copies)]
    x = torch.randn(m, k).bfloat16()
    return lambda i: torch.nn.functional.linear(x, weights[i])
