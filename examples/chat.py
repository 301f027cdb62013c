"""A conversation whose turns stay in the KV cache: python examples/chat.py ARTIFACT."""

import sys

import amx_tvm
from amx_tvm.runtime.chat import load_chat_template

engine = amx_tvm.load(sys.argv[1])
template = load_chat_template(sys.argv[1])
messages = [{"role": "system", "content": "Answer in one sentence."}]
with engine.sequence() as conversation:
    for question in ("What is the tallest mountain?", "In which country is it?"):
        messages.append({"role": "user", "content": question})
        answer = engine.generate(
            template.render(messages), max_new_tokens=48, sequence=conversation
        )
        messages.append({"role": "assistant", "content": answer.text})
        print(f"{question}\n  {answer.text.strip()}")
        # The second turn computes its own tokens only.
        print(f"  ({answer.timings.prefill_tokens} prompt tokens were computed)")
