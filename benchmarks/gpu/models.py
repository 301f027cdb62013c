"""Whole models of random weights at the shapes of published ones: build, then time.

    python -m benchmarks.gpu.models build --out build/models --arch sm_90a [--model llama-8b]
    python -m benchmarks.gpu.models run --out build/models --json models.json [--profile]

Building needs no GPU, running no compiler, and no weights travel: they are made on the GPU. Before
anything is timed, decode steps, a forked sequence and a batch are compared with the logits of the
prefill kernels, which share no code with them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.gpu.mixtures import MIXTURES, expert_shapes

COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
MODELS = {
    "llama-1b": {
        **COMMON,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
    },
    "llama-8b": {
        **COMMON,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
    },
}
# Rounding adds up over layers: rows of a batch are compared with sequences alone on four of them.
MODELS["llama-8b-4"] = {**MODELS["llama-8b"], "num_hidden_layers": 4}
MODELS |= MIXTURES
_TINY = {
    **COMMON,
    "vocab_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "hidden_size": 384,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "head_dim": 64,
}
# For tests: heads of both kinds, a window shorter than the text, bounded scores
TINY = {
    "tiny-llama": _TINY,
    "tiny-gemma2": {
        **_TINY,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "num_attention_heads": 4,
        "head_dim": 128,
        "sliding_window": 70,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 128,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
}
SCALE = 0x20  # E5M2, 2^-7: keeps a deep residual stream within float16
POWER = 0x78  # E8M0, the same
ROW_SCALE = 0.0625
ROUTER = 0.02  # scores of about 1
TOLERANCE = 2e-2
E4M3_TOLERANCE = 0.2  # prefill rounds x and W, decode does not
MIXED_TOLERANCE = 1.0  # one other choice of an expert changes what follows
LONG = 7800  # tokens of the long context
CHUNK = 8192  # rows of a call


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Weights of a model by their Hugging Face names."""
    whole: dict[str, tuple[int, ...]] = {}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[k] * config["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    found = {n: (config["vocab_size"], hidden) for n in ("model.embed_tokens", "lm_head")}
    if config["tie_word_embeddings"]:
        del found["lm_head"]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= {
            f"{at}.self_attn.q_proj": (q, hidden),
            f"{at}.self_attn.k_proj": (kv, hidden),
            f"{at}.self_attn.v_proj": (kv, hidden),
            f"{at}.self_attn.o_proj": (hidden, q),
            f"{at}.input_layernorm": (hidden,),
            f"{at}.post_attention_layernorm": (hidden,),
        }
        if "num_experts_per_tok" in config:
            whole |= expert_shapes(config, at)
        else:
            found |= {f"{at}.mlp.{n}_proj": (inner, hidden) for n in ("gate", "up")}
            found[f"{at}.mlp.down_proj"] = (hidden, inner)
        if config["model_type"] == "gemma2":
            found |= {f"{at}.{n}_feedforward_layernorm": (hidden,) for n in ("pre", "post")}
    found["model.norm"] = (hidden,)
    return {f"{name}.weight": shape for name, shape in found.items()} | whole


def build(
    name: str,
    arch: str,
    out: Path,
    quantization: str,
    head: str = "amxfp4",
    kv_cache: str = "auto",
) -> None:
    """Compile a model to OUT/NAME.so, with the records that ship; parameters: OUT/NAME.json."""
    from amx_tvm.compiler.compile import write_library
    from amx_tvm.compiler.lowered import lower_source
    from amx_tvm.config import QuantizationConfig
    from amx_tvm.frontends.base import ModelSource
    from amx_tvm.targets import resolve
    from relax_passes.rewriting import relax_functions
    from tuning.lookup import records_for

    class RandomSource(ModelSource):
        """Names and shapes; weights are never read."""

        def __init__(self) -> None:
            self.name, self.kind, self.config = name, "causal_lm", {**MODELS, **TINY}[name]
            self.generation_config = {"eos_token_id": [2]}
            self._shapes = shapes_of(self.config)

        def names(self) -> list[str]:
            return list(self._shapes)

        def shape(self, name: str) -> tuple[int, ...]:
            return self._shapes[name]

        def dtype(self, name: str) -> str:
            return "bf16"

        def load(self, name: str) -> np.ndarray:
            raise self.missing(name)

        @property
        def nbytes(self) -> int:
            return 0

        def write_tokenizer(self, directory) -> list[str]:  # noqa: ANN001
            return []

        def digest(self) -> str:
            return ""

    target = resolve(f"cuda:{arch}")
    config = replace(QuantizationConfig.parse(quantization), head=head, kv_cache=kv_cache)
    config = config.resolve("cuda")
    lowered = lower_source(RandomSource(), target, config, records=records_for(None, target))
    out.mkdir(parents=True, exist_ok=True)
    write_library(lowered, target, out / f"{name}.so")
    parameters: dict[str, Any] = {}
    for _, function in relax_functions(lowered.module):
        types = getattr(function.params[-1].ty, "fields", ()) if function.params else ()
        if len(types) == len(lowered.order):
            parameters = {
                n: [[int(v) for v in t.shape.values], str(t.dtype)]
                for n, t in zip(lowered.order, types, strict=True)
            }
    entry = {
        "name": name,
        "arch": arch,
        "quantization": quantization,
        "head": head,
        "parameters": parameters,
        "model": lowered.model,
        "kv_cache": lowered.kv_cache,
        "functions": lowered.functions,
    }
    (out / f"{name}.json").write_text(json.dumps(entry))


class RandomModel:
    """A built model with random weights on the GPU."""

    def __init__(self, out: Path, name: str, sequences: int = 4, tokens: int | None = None):
        import torch

        from amx_tvm import formats
        from amx_tvm.formats import e4m3
        from amx_tvm.runtime.engine import Engine
        from amx_tvm.runtime.vm import VirtualMachine

        self.entry = json.loads((out / f"{name}.json").read_text())
        generator = torch.Generator("cuda").manual_seed(0)

        def make(name: str, shape: list[int], dtype: str) -> torch.Tensor:
            if name.endswith(".codes") and name[:-5] + "scales" not in self.entry["parameters"]:
                halves = [*shape[:-1], shape[-1] // 2]  # unquantized, packed as fragments
                made = torch.randn(halves, device="cuda", generator=generator)
                return made.mul_(0.05).half().view(torch.uint8)
            if dtype == "uint8" and name.endswith("scales"):
                head = "lm_head" in name or "embed_tokens" in name
                fmt = self.entry.get("head" if head else "quantization", "")
                scale = POWER if fmt.startswith("mxfp4") else SCALE
                return torch.full(shape, scale, dtype=torch.uint8, device="cuda")
            if name.endswith(".table"):
                fmt = formats.get(self.entry["quantization"].removesuffix("-w4a8"))
                table = e4m3.table(fmt, {"": np.array([SCALE], np.uint8)})
                return torch.from_numpy(table).cuda()
            if dtype == "uint8":
                options = {"dtype": torch.uint8, "device": "cuda", "generator": generator}
                return torch.randint(0, 256, shape, **options)
            if "router" in name:
                return torch.randn(shape, device="cuda", generator=generator).mul_(ROUTER)
            if dtype == "float32":  # a tensor's scale, one a tile; a bias
                return torch.full(shape, ROW_SCALE, device="cuda")
            if "norm" in name:
                return torch.ones(shape, dtype=torch.float16, device="cuda")
            return torch.randn(shape, device="cuda", generator=generator).mul_(0.5).half()

        machine = VirtualMachine(out / f"{name}.so", "cuda", self.entry["arch"].split("+"))
        self._tensors = [make(n, *spec) for n, spec in self.entry["parameters"].items()]
        torch.cuda.synchronize()
        ffi = machine._ffi
        machine.load_parameters = lambda *_: ffi.convert(  # type: ignore[method-assign]
            [ffi.from_dlpack(t) for t in self._tensors]
        )
        manifest = SimpleNamespace(**{k: self.entry[k] for k in ("model", "kv_cache", "functions")})
        place = Path("no tokenizer")
        context = int(manifest.model["context_length"])
        self.engine = Engine(
            place, manifest, machine, context, sequences, tokens, "auto", CHUNK, may_grow=False
        )
        vocab = int(manifest.model["vocab_size"])
        self.tokens = np.random.default_rng(0).integers(100, vocab, 8000).tolist()


def check(model: RandomModel) -> dict[str, float]:
    """Relative differences of decode, fork and batch logits from those of prefill."""
    from amx_tvm.runtime import session

    tokens, engine = model.tokens, model.engine
    full = engine.logits(tokens[:300])

    def error(logits: np.ndarray, row: int) -> float:
        return float(np.linalg.norm(logits - full[row]) / np.linalg.norm(full[row]))

    with engine.sequence() as sequence:
        sequence.append(tokens[:200])
        found = {"decode": max(error(sequence.append([tokens[i]]), i) for i in range(200, 232))}
        fork = sequence.fork(150)
        found["fork"] = error(fork.append(tokens[150:200]), 199)
        rows = session.decode_batch([sequence, fork], [tokens[232], tokens[200]])
        found["batch"] = max(error(rows[0], 232), error(rows[1], 200))
        found["second chunk"] = error(sequence.append(tokens[233:300]), 299)
        fork.close()
        # beyond 256 tokens several blocks share a head
        sequence.rollback(30)
        found["decode, longer"] = max(error(sequence.append([tokens[i]]), i) for i in (270, 271))
    return found


def decode_speed(model: RandomModel, context: int, steps: int = 128, repeats: int = 5) -> float:
    """Median tokens/s of greedy decoding behind a context."""
    speeds = []
    with model.engine.sequence() as sequence:
        sequence.append(model.tokens[:context])
        token = 5

        def repeat() -> float:
            nonlocal token
            start = time.perf_counter()
            for _ in range(steps):
                token = sequence.choose(token)
            return steps / (time.perf_counter() - start)

        for _ in range(repeats + 1):
            speeds.append(model.engine.call(repeat))
            sequence.rollback(steps)
    return float(np.median(speeds[1:]))


def prefill_speed(model: RandomModel, tokens: int, repeats: int = 5) -> float:
    """Median tokens/s of prefill."""
    speeds = []
    for _ in range(repeats + 1):
        with model.engine.sequence() as sequence:
            start = time.perf_counter()
            sequence.append(model.tokens[:tokens])
            speeds.append(tokens / (time.perf_counter() - start))
    return float(np.median(speeds[1:]))


def profile(model: RandomModel, context: int) -> list[tuple[str, float, float]]:
    """Kernels of a step: (name, launches, microseconds from the end of the one before to its own).

    Dependent launches overlap, so a kernel's own duration says little.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    steps = 8
    with model.engine.sequence() as sequence:
        sequence.append(model.tokens[:context])
        token = 5
        for _ in range(4):
            token = sequence.choose(token)
        with record(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(steps):
                token = sequence.choose(token)
    events = sorted(
        (e for e in recorded.events() if e.device_type.name == "CUDA"),
        key=lambda e: e.time_range.end,
    )
    spans: dict[str, list[float]] = {}
    for before, event in zip(events, events[1:], strict=False):
        spans.setdefault(event.name, []).append(event.time_range.end - before.time_range.end)
    rows = [(name, len(v) / steps, sum(v) / steps) for name, v in spans.items()]
    return sorted(rows, key=lambda row: -row[2])


def run(name: str, out: Path, profiled: bool) -> dict[str, Any]:
    """Check and time one model."""
    model = RandomModel(out, name)
    errors = check(model)
    result: dict[str, Any] = {"name": name, "errors": errors}
    tolerance = MIXED_TOLERANCE if name in MIXTURES else TOLERANCE
    if model.entry["quantization"].endswith("-w4a8"):
        tolerance = E4M3_TOLERANCE
    if not max(errors.values()) < tolerance:
        raise SystemExit(f"{name}: wrong results: {errors}")
    longest = int(model.entry["model"]["context_length"])
    for context in (c for c in (128, LONG) if c < longest):
        result[f"decode at {context}"] = decode_speed(model, context)
    for tokens in (n for n in (128, 2048) if n <= longest):
        result[f"prefill {tokens}"] = prefill_speed(model, tokens)
    for key, value in result.items():
        print(f"{name}: {key}: {value if not isinstance(value, float) else round(value, 1)}")
    if profiled:
        for context in (128, LONG):
            result[f"profile at {context}"] = profile(model, context)
            print(f"{name}, a step at {context} tokens of context, us by kernel:")
            for kernel, count, microseconds in result[f"profile at {context}"][:12]:
                print(f"  {microseconds:8.1f}  {count:5.1f} x {kernel[:70]}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--model", choices=(*MODELS, *TINY), action="append")
    parser.add_argument("--quantization", default="amxfp4")
    parser.add_argument("--head", default="amxfp4", help='format of the head, or "auto", "none"')
    parser.add_argument("--kv-cache", default="auto", help="as `amx-tvm compile` takes it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    results = []
    for name in args.model or ("llama-1b", "llama-8b"):
        if args.action == "build":
            build(name, args.arch, args.out, args.quantization, args.head, args.kv_cache)
        else:
            results.append(run(name, args.out, args.profile))
    if args.json and results:
        import torch

        document = {"device": torch.cuda.get_device_name(), "results": results}
        args.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
