"""Time of attention on this CPU: decode, prefill, and what the cache runtime adds to them.

    python benchmarks/cpu_attention.py [--threads 1 2] [--dtype float32 float16] [--mcpu x86-64-v3]

Every figure is the time of one layer's call (rotary embedding, append, attention) in a model that
only consists of attention layers, each with pages of its own: the median, and the best one, which
says more on a machine that others use too; GB/s and GFLOP/s are of the best.  The
"GB/s" of decode is K and V over that time; a layer's pages are cold once all layers together
exceed the last-level cache.  GFLOP/s of prefill counts the visible half of Q K^T and P V.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

SHAPES = {  # layers, heads, kv_heads, head_dim
    "SmolLM2-135M": (30, 9, 3, 64),
    "Llama-3.2-1B": (16, 32, 8, 64),
}
CONTEXTS = (128, 1024, 4096)


def build(shape, dtype, cpu):
    """Compile an attention-only model for an LLVM CPU; "" is this one."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend import nn
    from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

    from amx_tvm.models.config import Rope
    from amx_tvm.models.rope import frequencies
    from amx_tvm.models.step import Step, kv_cache
    from relax_passes.attention_spec import AttentionSpec, CacheStorage
    from relax_passes.passes.lower_attention import lower_attention

    layers, heads, kv_heads, d = shape
    turn = frequencies(Rope(500000.0), d)
    specs = [AttentionSpec(i, heads, kv_heads, d, d**-0.5, rotation=turn) for i in range(layers)]
    cpu = cpu or tvm.target.codegen.llvm_get_system_cpu()
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu})

    class Model(nn.Module):
        def create_kv_cache(self, batch, total, chunk):
            return kv_cache(batch, total, chunk)

        def forward(self, qkv: nn.Tensor, cache: PagedKVCache):
            step = Step(cache, qkv.shape[0])
            x = qkv.reshape(qkv.shape[0], heads + 2 * kv_heads, d)
            out = step.attend(specs[0], x)
            for spec in specs[1:]:  # of a result that nobody reads nothing would be left
                out = out + step.attend(spec, x)
            return out

    none = {"param_mode": "none", "effect_mode": "none"}
    mod, _ = Model().export_tvm(
        spec={
            "create_kv_cache": {"batch": int, "total": int, "chunk": int, "$": dict(none)},
            "forward": {
                "qkv": nn.spec.Tensor(["n", (heads + 2 * kv_heads) * d], "float32"),
                "cache": nn.spec.Object(object_type=PagedKVCache),
                "$": dict(none),
            },
        }
    )
    mod = lower_attention(target, CacheStorage(dtype))(mod)
    return relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())


def measure(name, dtype, batches=(1,), cpu=""):
    """Print the table of one model shape."""
    import numpy as np
    import tvm

    shape = SHAPES[name]
    layers, heads, kv_heads, d = shape
    vm = build(shape, dtype, cpu)
    state = {
        k: tvm.get_global_func(f"vm.builtin.kv_state_{k}")
        for k in ("add_sequence", "remove_sequence", "begin_forward", "end_forward", "popn")
    }
    shape_of = tvm.runtime.ShapeTuple
    rng = np.random.default_rng(0)
    width = (heads + 2 * kv_heads) * d

    def forward(kv, ids, lengths, x):
        state["begin_forward"](kv, shape_of(ids), shape_of(lengths))
        begin = time.perf_counter()
        vm["forward"](x, kv)
        elapsed = time.perf_counter() - begin
        state["end_forward"](kv)
        return elapsed / layers * 1e6

    def tokens(n):
        return tvm.runtime.tensor(rng.standard_normal((n, width), np.float32))

    chunk = 512
    for context in CONTEXTS:
        for batch in batches:
            capacity = batch * (context + chunk + 64)
            (kv,) = vm["create_kv_cache"](*(shape_of([n]) for n in (batch, capacity, chunk)))
            for seq in range(batch):
                state["add_sequence"](kv, seq)
                for start in range(0, context, chunk):
                    n = min(chunk, context - start)
                    forward(kv, [seq], [n], tokens(n))
            x = tokens(batch)
            ids, ones = list(range(batch)), [1] * batch
            samples = []
            for _ in range(15 if context > 1000 else 200):
                samples.append(forward(kv, ids, ones, x))
                for seq in ids:
                    state["popn"](kv, seq, 1)
            us, best = statistics.median(samples), min(samples)
            size = batch * context * kv_heads * d * 2 * (2 if dtype == "float16" else 4)
            print(
                f"{name:13s} {dtype} decode  context {context:5d} batch {batch}: "
                f"{us:8.1f} us/layer, best {best:8.1f}  {size / best / 1e3:6.1f} GB/s",
                flush=True,
            )
    for past, n in ((0, 512), (1536, 512)):
        (kv,) = vm["create_kv_cache"](*(shape_of([m]) for m in (1, 2048, 1536)))
        samples = []
        for _ in range(4):
            state["add_sequence"](kv, 0)
            if past:
                forward(kv, [0], [past], tokens(past))
            samples.append(forward(kv, [0], [n], tokens(n)))
            state["remove_sequence"](kv, 0)
        us, best = statistics.median(samples), min(samples)
        flops = 4 * heads * d * (n * past + n * (n + 1) / 2)
        print(
            f"{name:13s} {dtype} prefill {n:4d} after {past:4d}: {us:10.1f} us/layer, "
            f"best {best:10.1f}  {flops / best / 1e3:6.1f} GFLOP/s",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--dtype", nargs="*", default=["float32"])
    parser.add_argument("--model", nargs="*", default=list(SHAPES))
    parser.add_argument("--batch", type=int, nargs="*", default=[1])
    parser.add_argument("--mcpu", default="", help="LLVM's name of the CPU to compile for")
    args = parser.parse_args()
    if "AMX_ATTENTION_CHILD" in os.environ:
        for model in args.model:
            for dtype in args.dtype:
                measure(model, dtype, args.batch, args.mcpu)
        return
    for threads in args.threads:  # the runtime reads the thread count once a process
        print(f"threads {threads}")
        env = dict(os.environ, TVM_NUM_THREADS=str(threads), AMX_ATTENTION_CHILD="1")
        subprocess.run([sys.executable, *sys.argv], env=env, check=True)


if __name__ == "__main__":
    main()
