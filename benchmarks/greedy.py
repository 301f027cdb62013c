"""Greedy text of a real file in strict mode, beside transformers' on the rounded weights.

    python -m benchmarks.greedy MODEL [--quantization amxfp4] [--tokens 64]

compiles a checkpoint with its head in int8, builds the model of ``transformers`` with the same
rounded weights in float32, and prints for each prompt how many tokens are equal before the first
that differs, and how far the logits are apart. Of families whose checkpoints have the names of
``transformers`` (Llama, Qwen2, Qwen3, Gemma 3).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import amx_tvm
from amx_tvm import formats
from amx_tvm.frontends import ModelSource, open_model

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "One, two, three, four, five, six,",
)
HEADS = ("lm_head.weight", "embed_tokens.weight")


def rounded(source: ModelSource, quantization: str) -> dict[str, torch.Tensor]:
    """Return the weights as an artifact has them, in float32."""
    made = {}
    for name in source.names():
        array = source.load(name)
        if array.ndim == 2:
            fmt = formats.get("int8" if name.endswith(HEADS) else quantization)
            raw = source.load_raw(name)
            same = raw is not None and raw.format.name == fmt.name
            array = fmt.dequantize(raw if same else fmt.quantize(array))
        made[name] = torch.from_numpy(array)
    return made


def reference(source: ModelSource, quantization: str) -> Any:
    """Return the model of transformers with rounded weights."""
    config = dict(source.config)
    theta, near = config.pop("rope_theta", 1e4), config.pop("rope_local_base_freq", None)
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    ropes: dict[str, Any] = {**scaling, "rope_theta": theta}
    if near is not None:
        local = {"rope_type": "default", "rope_theta": near}
        ropes = {"full_attention": ropes, "sliding_attention": local}
    config["rope_parameters"] = ropes
    if "query_pre_attn_scalar" in config:  # of a GGUF file it is no integer
        config["query_pre_attn_scalar"] = int(config["query_pre_attn_scalar"])
    made = transformers.AutoConfig.for_model(**config)
    made._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(made).float().eval()
    lacking = model.load_state_dict(rounded(source, quantization), strict=False)
    assert not lacking.unexpected_keys, lacking
    model.tie_weights()
    return model


@torch.inference_mode()
def continued(model: Any, ids: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """Return greedy tokens and the logits [len(ids) + count, vocab] of all."""
    made, cache, given = list(ids), None, torch.tensor([ids])
    for _ in range(count):
        out = model(given, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        made.append(int(out.logits[0, -1].argmax()))
        given = torch.tensor([made[-1:]])
    return made[len(ids) :], model(torch.tensor([made])).logits[0].numpy()


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--quantization", default="amxfp4")
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "artifact"
        amx_tvm.compile(given.model, quantization=given.quantization, strict=True, output=output)
        engine: Any = amx_tvm.load(output, context_length=512)
        model = reference(open_model(given.model), given.quantization)
        for prompt in PROMPTS:
            ids = engine.encode(prompt)
            found = engine.generate(ids, given.tokens, ignore_eos=True).token_ids
            wanted, expected = continued(model, ids, given.tokens)
            equal = next(
                (i for i, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]),
                len(found),
            )
            logits = np.asarray(engine.logits(ids + wanted))
            apart = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
            print(f"{equal} of {len(found)} tokens equal, logits {apart:.1e} apart: {prompt!r}")
            print(f"    {engine.decode(found)[:100]!r}", flush=True)


if __name__ == "__main__":
    main()
