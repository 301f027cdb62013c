"""Print text while it is generated: python examples/stream.py ARTIFACT [PROMPT]."""

import sys

import amx_tvm

engine = amx_tvm.load(sys.argv[1])
prompt = sys.argv[2] if len(sys.argv) > 2 else "The capital of France is"
with engine.stream(prompt, max_new_tokens=48, temperature=0.7, top_p=0.9, seed=1) as pieces:
    print(prompt, end="")
    for piece in pieces:
        print(piece, end="", flush=True)
result = pieces.result
print(f"\n{len(result.token_ids)} tokens, {result.timings.decode_tokens_per_s:.0f} a second")
