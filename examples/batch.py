"""Several prompts that share every step: python examples/batch.py ARTIFACT."""

import sys
import time

import amx_tvm

PROMPTS = ["The sky is", "Bread is made of", "In winter", "A cat"]

engine = amx_tvm.load(sys.argv[1], max_sequences=len(PROMPTS))
start = time.perf_counter()
results = engine.generate_batch(PROMPTS, max_new_tokens=24, ignore_eos=True)
seconds = time.perf_counter() - start
for prompt, result in zip(PROMPTS, results, strict=True):
    print(f"{prompt!r} -> {result.text!r}")
tokens = sum(len(result.token_ids) for result in results)
print(f"{tokens / seconds:.0f} tokens a second, all together")
