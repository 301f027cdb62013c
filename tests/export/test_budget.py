"""The memory limit: it sizes the context, it holds, and what does not fit is refused before."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

import amx_tvm
from amx_tvm.errors import GenerationError, TargetError
from amx_tvm.runtime import budget

MIB = 1 << 20


def test_parse_size():
    assert budget.parse_size("300M") == budget.parse_size("300 MiB") == 300 * MIB
    assert budget.parse_size("1.5g") == 1536 * MIB
    assert budget.parse_size("1024") == budget.parse_size("1k") == budget.parse_size(1024) == 1024
    assert budget.parse_size(1024.0) == 1024
    for wrong in ("", "M", "12X", "-1M", "1 2", 0, -1, float("nan"), 1.5, True, [1]):
        with pytest.raises(TargetError, match="memory size"):
            budget.parse_size(wrong)


def test_fit_uses_what_is_left(tiny_artifact):
    manifest = tiny_artifact.manifest
    assert budget.kv_bytes(manifest) == 2 * 2 * 2 * 16 * 4  # k and v, layers, heads, size, float32
    small, chunk = budget.fit(manifest, 80 * MIB, None, used=10 * MIB)
    assert small == 1024 and chunk == 512  # the model's own context fits
    fixed = 10 * MIB + budget.RUNTIME_BYTES + manifest.library.bytes
    fixed += sum(shard.bytes for shard in manifest.parameters.shards)
    limit = fixed + budget.working_bytes(manifest, 32) + 200 * budget.kv_bytes(manifest)
    context, chunk = budget.fit(manifest, limit, None, used=10 * MIB)
    page = manifest.kv_cache["page_size"]
    assert (context, chunk) == (200 // page * page, 32)
    assert budget.fit(manifest, limit, 128, used=10 * MIB) == (128, 32)


def test_refusal_names_the_numbers(tiny_artifact):
    with pytest.raises(GenerationError) as caught:
        amx_tvm.load(tiny_artifact.path, max_memory="20M")
    message = str(caught.value)
    assert "does not fit into 20 MiB" in message and "128 tokens of context" in message
    with pytest.raises(GenerationError, match="1024 tokens of context"):
        budget.fit(tiny_artifact.manifest, 60 * MIB, 1024, used=30 * MIB)


def test_a_gpu_without_room_is_refused_before(tiny_artifact):
    manifest, gib = tiny_artifact.manifest, 1 << 30
    budget.require_device(manifest, gib, 4096, 512)
    token = budget.kv_bytes(manifest)
    with pytest.raises(GenerationError) as caught:
        budget.require_device(manifest, gib, 2 * gib // token, 512)
    fits = int(str(caught.value).partition("kv_tokens=")[2].partition(",")[0])
    assert "1024 MiB that are free on the GPU" in str(caught.value) and fits > 128
    budget.require_device(manifest, gib, fits, 512)
    with pytest.raises(GenerationError, match="tokens fit"):
        budget.require_device(manifest, gib, fits + manifest.kv_cache["page_size"], 512)
    with pytest.raises(GenerationError, match="free some, take a smaller model or a larger GPU"):
        budget.require_device(manifest, 100 * MIB, 128, 512)


def test_a_gpu_keeps_room_for_tokens_in_16_bits(tiny_artifact):
    manifest, gib = tiny_artifact.manifest, 1 << 30
    packed = {"page_bytes": 64_000, "sequence_bytes": MIB}
    few = replace(manifest, kv_cache={**manifest.kv_cache, "packed": packed})
    budget.require_device(few, gib, 4096, 512, sequences=16)
    with pytest.raises(GenerationError, match="does not fit into the 1024 MiB"):
        budget.require_device(few, gib, 4096, 512, sequences=1024)


def test_limit_holds(tiny_artifact):
    """A fresh process with a full context stays below its limit."""
    script = (
        "import sys, amx_tvm.runtime as r; "
        "e = r.load(sys.argv[1], max_memory='110M', threads=2); "
        "e.generate([i % 290 + 3 for i in range(e.context_length - 4)], 4, ignore_eos=True); "
        "status = open('/proc/self/status').read(); "
        "print(e.context_length, status.split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tiny_artifact.path],
        capture_output=True,
        text=True,
        check=True,
    )
    context, peak = map(int, done.stdout.split())
    assert context == 1024 and peak < 110 * 1024
