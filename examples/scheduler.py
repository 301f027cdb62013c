"""Requests with options of their own that come and go: python examples/scheduler.py ARTIFACT."""

import sys
from dataclasses import replace

import amx_tvm

engine = amx_tvm.load(sys.argv[1])
with engine.scheduler() as scheduler:
    first = scheduler.add(engine.request("Once upon a time", max_new_tokens=24))
    for _ in range(8):
        scheduler.step()
    # The second comes while the first is under way; both share the steps that follow.
    request = engine.request("The weather today", max_new_tokens=8, temperature=0.8, seed=3)
    second = scheduler.add(replace(request, on_finish=lambda _: print("the second has ended")))
    while scheduler.step():
        pass
print(repr(first.result.text))
print(repr(second.result.text))
