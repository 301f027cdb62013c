"""A two-layer grouped-query decoder with random weights, compiled to a real artifact in seconds.

It exports the VM functions that every artifact exports, with TVM's stock paged KV cache, so the
runtime is tested against a real executable without the compiler of this project.
"""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from amx_tvm.artifact import ArtifactWriter, Manifest, TargetRecord, Versions

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 2, 64, 4, 2, 16, 96
CONTEXT, CHUNK, PAGE = 256, 32, 16
EOS = 0


def _build_module(vocab: int):
    import tvm
    from tvm import relax, tirx
    from tvm.relax.frontend import nn
    from tvm.relax.frontend.nn import op
    from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache

    # Not at opt-level 0: attention behind cached tokens gives NaN there.
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})

    class Layer(nn.Module):
        def __init__(self, index: int):
            self.index = index
            self.norm1 = nn.RMSNorm(HIDDEN, -1, 1e-5, bias=False)
            self.norm2 = nn.RMSNorm(HIDDEN, -1, 1e-5, bias=False)
            self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
            self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
            self.up = nn.Linear(HIDDEN, MLP, bias=False)
            self.down = nn.Linear(MLP, HIDDEN, bias=False)

        def forward(self, x, kv: PagedKVCache):
            b, s, _ = x.shape
            qkv = op.reshape(self.qkv(self.norm1(x)), (b, s, HEADS + 2 * KV_HEADS, HEAD_DIM))
            attention = kv.attention_with_fused_qkv(self.index, qkv, HEADS, HEAD_DIM**-0.5)
            x = x + self.out(op.reshape(attention, (b, s, HEADS * HEAD_DIM)))
            return x + self.down(op.silu(self.up(self.norm2(x))))

    class Toy(nn.Module):
        def __init__(self):
            self.embed = nn.Embedding(vocab, HIDDEN)
            self.layers = nn.ModuleList([Layer(i) for i in range(LAYERS)])
            self.norm = nn.RMSNorm(HIDDEN, -1, 1e-5, bias=False)
            self.head = nn.Linear(HIDDEN, vocab, bias=False)

        def _body(self, ids, kv):
            rows = ids.shape[0]
            x = self.embed(op.reshape(ids, (1, rows)))
            for layer in self.layers:
                x = layer(x, kv)
            return op.reshape(self.norm(x), (rows, HIDDEN))

        def forward(self, ids: nn.Tensor, picks: nn.Tensor, kv: PagedKVCache):
            return self.head(op.take(self._body(ids, kv), picks, axis=0))

        def forward_one(self, ids: nn.Tensor, kv: PagedKVCache):
            return self.head(self._body(ids, kv))

        def create_kv_cache(
            self,
            max_batch_size: tirx.Var,
            max_total_seq_len: tirx.Var,
            prefill_chunk_size: tirx.Var,
        ):
            made = TIRPagedKVCache(
                attn_kind="mha",
                max_batch_size=max_batch_size,
                max_total_seq_len=max_total_seq_len,
                prefill_chunk_size=prefill_chunk_size,
                page_size=PAGE,
                support_sliding_window=0,
                layer_partition=relax.ShapeExpr([0, LAYERS]),
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KV_HEADS,
                qk_head_dim=HEAD_DIM,
                v_head_dim=HEAD_DIM,
                mla_original_qk_head_dim=HEAD_DIM,
                mla_original_v_head_dim=HEAD_DIM,
                rope_mode=RopeMode.NORMAL,
                rope_scale=1,
                rope_theta=10000,
                rope_scaling={},
                rope_ext_factors=relax.prim_value(0),
                rotary_dim=HEAD_DIM,
                enable_disaggregation=False,
                dtype="float32",
                target=target,
            )
            return (made,)

    modes = {"param_mode": "packed", "effect_mode": "none"}
    model = Toy()
    cache = nn.spec.Object(object_type=PagedKVCache)
    spec = {
        "forward": {
            "ids": nn.spec.Tensor(["rows"], "int32"),
            "picks": nn.spec.Tensor(["picks"], "int32"),
            "kv": cache,
            "$": dict(modes),  # export_tvm takes the "$" out of each
        },
        "forward_one": {"ids": nn.spec.Tensor([1], "int32"), "kv": cache, "$": dict(modes)},
        "create_kv_cache": {
            "max_batch_size": int,
            "max_total_seq_len": int,
            "prefill_chunk_size": int,
            "$": {"param_mode": "none", "effect_mode": "none"},
        },
    }
    module, params = model.export_tvm(spec=spec)
    return module, params, target


@cache
def tokenizer():
    """A byte-level BPE tokenizer: 256 bytes, <eos> = 0 and a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = "the quick brown fox jumps over the lazy dog and then the cat sat on the mat " * 4
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    result.train_from_iterator([text], trainer)
    return result


def build(output: Path, overwrite: bool = False) -> Manifest:
    """Compile the toy into an artifact directory."""
    import tvm

    tokens = tokenizer()
    vocab = tokens.get_vocab_size()
    module, params, target = _build_module(vocab)
    random = np.random.default_rng(7)
    with ArtifactWriter(output, overwrite, shard_bytes=64 << 10) as writer:
        tvm.compile(module, target).export_library(str(writer.path("lib.so")))
        for name, parameter in params:
            shape = [int(size) for size in parameter.shape]
            scale = 1.0 if len(shape) == 1 else 3.0 / np.sqrt(shape[-1])
            values = random.standard_normal(shape) * scale
            writer.parameters.add(
                name, (np.abs(values) if len(shape) == 1 else values).astype("f4")
            )
        tokens.save(str(writer.path("tokenizer.json")))
        return writer.finish(
            Manifest(
                versions=Versions("0.1.0", version("apache-tvm"), version("apache-tvm-ffi")),
                target=TargetRecord("llvm-test", "llvm", platform.machine() + "-linux-gnu"),
                library=writer.library(),
                parameters=writer.parameters.finish(),
                model={
                    "family": "toy",
                    "name": "toy",
                    "config": {
                        "hidden_size": HIDDEN,
                        "intermediate_size": MLP,
                        "num_attention_heads": HEADS,
                        "num_key_value_heads": KV_HEADS,
                        "head_dim": HEAD_DIM,
                        "vocab_size": vocab,
                    },
                    "vocab_size": vocab,
                    "context_length": CONTEXT,
                    "eos_token_ids": [EOS],
                    "bos_token_id": None,
                    "prompt_prefix": [],
                },
                quantization={"format": "none", "bits_per_weight": 32.0},
                kv_cache={
                    "page_size": PAGE,
                    "dtype": "float32",
                    "layers": LAYERS,
                    "kv_heads": KV_HEADS,
                    "head_dim": HEAD_DIM,
                    "prefill_chunk": CHUNK,
                },
                linears=[
                    {
                        "name": "layers.0.qkv",
                        "spec": {
                            "format": "none",
                            "n": (HEADS + 2 * KV_HEADS) * HEAD_DIM,
                            "k": HIDDEN,
                        },
                        "kernel": "matmul",
                        "why": "not quantized",
                    }
                ],
                functions=["create_kv_cache", "forward", "forward_one"],
            )
        )


_SHARED: list[Path] = []


def shared(factory) -> Path:
    """Build the toy once a session, whichever folder's tests ask first."""
    if not _SHARED:
        path = factory.mktemp("toy") / "artifact"
        build(path)
        _SHARED.append(path)
    return _SHARED[0]
