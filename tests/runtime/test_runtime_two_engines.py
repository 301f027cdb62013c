"""Two engines of one artifact in one process: in turn, and each in a thread of its own."""

from __future__ import annotations

import threading

import numpy as np

import amx_tvm.runtime

NEW = 12


def test_they_share_nothing(artifact):
    prompts = [np.random.default_rng(i).integers(1, 300, 3 + i).tolist() for i in range(16)]

    def load():
        return amx_tvm.runtime.load(artifact)

    def text(engine, prompt):
        return engine.generate(prompt, max_new_tokens=NEW, ignore_eos=True).token_ids

    one = load()
    expected = [text(one, prompt) for prompt in prompts]
    two = [one, load()]
    assert [text(two[i % 2], prompt) for i, prompt in enumerate(prompts)] == expected
    found: dict[int, list[int]] = {}

    def work(first):
        engine = load()
        for i in range(first, len(prompts), 2):
            found[i] = text(engine, prompts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(i) for i in range(len(prompts))] == expected


def test_they_share_the_open_library(artifact):
    """TVM's functions find others through the module that was opened last, which must not end."""
    one, two = (amx_tvm.runtime.load(artifact, threads=1) for _ in range(2))
    assert two._machine._executable is one._machine._executable
    del two
    assert one.generate([1, 2, 3], 4).token_ids
