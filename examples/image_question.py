"""A question about an image: python examples/image_question.py ARTIFACT IMAGE [QUESTION].

ARTIFACT is of a model that takes images (docs/models.md), such as SmolVLM or LLaVA 1.5.
"""

import sys

import amx_tvm

artifact, image = sys.argv[1:3]
question = sys.argv[3] if len(sys.argv) > 3 else "What is this?"
engine = amx_tvm.load(artifact)
prompt = f"User:<image>{question}\nAssistant:"
result = engine.generate(prompt, max_new_tokens=48, images=[image])
print(f"{result.text.strip()}\nseen in {result.timings.image_s:.2f} s")
