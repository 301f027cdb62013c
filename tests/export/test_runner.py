"""The C++ runner here: its tokenizer, its text and its refusals are those of the Python runtime."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess

import pytest
from export_tools import skip_without

import amx_tvm

pytestmark = pytest.mark.slow
BLOCKS = ((32, 127), (0xA0, 0x250), (0x300, 0x530), (0x900, 0xA00), (0x2000, 0x2070))
BLOCKS += ((0x3000, 0x3200), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F700), (0, 32))


@pytest.fixture(scope="module")
def bundle(tiny_artifact, tmp_path_factory):
    skip_without("cmake", "g++")
    output = tmp_path_factory.mktemp("runner") / "bundle"
    return amx_tvm.export(tiny_artifact, "x86-64-v2", output, runtimes=("runner",))


def run(bundle, *arguments, folder=None, text=None):
    command = [f"{bundle.path}/bin/amx-run", folder or bundle.path, *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_same_tokens_as_python(bundle):
    prompt = list(range(3, 40))
    done = run(bundle, "--ids", ",".join(map(str, prompt)), "-n", "48", "--print-ids")
    assert done.returncode == 0, done.stderr
    ids = done.stdout.rpartition("ids:")[2].split(",")
    expected = amx_tvm.load(bundle.path).generate(prompt, 48)
    assert [int(token) for token in ids] == expected.token_ids
    assert "tokens/s, peak memory" in done.stderr


def test_size(bundle):
    assert bundle.runtime_bytes < 12e6


def texts():
    draw = random.Random(3)
    found = [
        "",
        " ",
        "I'm  you'LL\n\n\tx",
        "日本語 123 ½",
        "a\r\n b\u3000c\u0085d",
        "\x00<|im_end|>",
    ]
    for _ in range(400):
        parts = [
            "".join(chr(draw.randint(*draw.choice(BLOCKS))) for _ in range(4))
            + draw.choice(" \nA1")
            for _ in range(6)
        ]
        found.append("".join(parts))
    return found


def kinds():
    from amx_tvm.frontends.gguf.pretokenizers import KINDS

    return sorted(KINDS)


@pytest.mark.parametrize("kind", kinds())
def test_tokenizer(bundle, tmp_path, kind):
    """A vocabulary trained on the texts themselves, cut as each kind of GGUF vocabulary is."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from amx_tvm.frontends.gguf.pretokenizers import find_kind

    entry = find_kind(kind)
    tokenizer = Tokenizer(models.BPE(ignore_merges=entry.ignore_merges))
    if entry.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = entry.build()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    samples = texts()
    tokenizer.train_from_iterator(samples, trainer)
    # The state of a training run, which no prompt may feel.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in samples]
    lines = "".join(json.dumps(text) + "\n" for text in samples)
    done = run(bundle, "--encode", folder=tmp_path, text=lines)
    assert [json.loads(line) for line in done.stdout.split("\n")[:-1]] == ids
    lines = "".join(json.dumps(row) + "\n" for row in ids)
    done = run(bundle, "--decode", folder=tmp_path, text=lines)
    decoded = [json.loads(line) for line in done.stdout.split("\n")[:-1]]
    assert decoded == [tokenizer.decode(row) for row in ids]


def test_refusals(bundle, tiny_bundle):
    done = run(bundle, "--ids", "1", folder=tiny_bundle.path)
    assert done.returncode == 2 and "this machine is x86_64" in done.stderr
    done = run(bundle, "--ids", "300")
    assert done.returncode == 2 and "outside the vocabulary of 300" in done.stderr


def encode(bundle, folder, text="aaaa b"):
    return run(bundle, "--encode", folder=folder, text=json.dumps(text) + "\n")


STEPS = {
    "a replacement of nothing": {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    "a growing text": {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
    },
    "many steps": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100},
    "a kind that is none": {"type": ["NFC"]},
}


@pytest.mark.parametrize("name", STEPS)
def test_tokenizers_without_end(bundle, tmp_path, name):
    from tokenizers import Tokenizer, models

    value = json.loads(Tokenizer(models.BPE({"a": 0}, [])).to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**value, "normalizer": STEPS[name]}))
    done = encode(bundle, tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr


FILES = {
    "deep": '{"model":' + "[" * 100_000,
    "an id beyond": '{"model": {"vocab": {"a": 1e30}, "merges": []}}',
    "a large id": '{"model": {"vocab": {"a": 2147483647}, "merges": []}}',
    "a merge without a space": '{"model": {"vocab": {"a": 0}, "merges": ["a"]}}',
    "no object": "[1]",
}


@pytest.mark.parametrize("name", FILES)
def test_tokenizer_files_that_are_none(bundle, tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(FILES[name])
    done = encode(bundle, tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr


def test_more_values_than_a_tokenizer_has(bundle, tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"x": [' + "1," * (1 << 22) + "1]}")
    done = encode(bundle, tmp_path)
    assert done.returncode == 2 and "more than 4194304 values" in done.stderr


def test_a_pipe_is_not_waited_for(bundle, tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    done = encode(bundle, tmp_path)
    assert done.returncode == 2 and "no regular file" in done.stderr


FORGED = {
    "shape": lambda d: next(iter(d["parameters"]["tensors"].values())).update(shape=[1 << 62, 4]),
    "bytes": lambda d: next(iter(d["parameters"]["tensors"].values())).update(bytes=-64),
    "offset": lambda d: next(iter(d["parameters"]["tensors"].values())).update(offset=2**63 - 64),
    "block_bytes": lambda d: d["parameters"]["shards"][0].update(block_bytes=0),
    "crc32": lambda d: d["parameters"]["shards"][0].update(crc32=[]),
    "file": lambda d: d["library"].update(file="../../lib.so"),
    "head_dim": lambda d: d["kv_cache"].update(head_dim=1e30),
    "eos": lambda d: d["model"].update(eos_token_ids=["x"]),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_manifests(bundle, tmp_path, name):
    from amx_tvm.artifact.manifest import _digest

    shutil.copytree(bundle.path, tmp_path / "b", ignore=shutil.ignore_patterns("runtime", "bin"))
    file = tmp_path / "b" / "manifest.json"
    data = json.loads(file.read_text())
    FORGED[name](data)
    data["digest"] = _digest(data)
    file.write_text(json.dumps(data, sort_keys=True))
    done = run(bundle, "--ids", "1", "--no-verify", folder=tmp_path / "b")
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr


def test_keys_and_values_in_few_bits(tmp_path):
    skip_without("cmake", "g++")
    from tiny_model import write_model

    model = write_model(tmp_path / "model", head=32)
    made = amx_tvm.compile(
        model, "x86-64-v2", output=tmp_path / "made", strict=True, kv_cache="amxfp4"
    )
    bundle = amx_tvm.export(made, "x86-64-v2", tmp_path / "bundle", runtimes=("runner",))
    prompt = list(range(3, 140))
    done = run(bundle, "--ids", ",".join(map(str, prompt)), "-n", "48", "--print-ids")
    assert done.returncode == 0, done.stderr
    ids = done.stdout.rpartition("ids:")[2].split(",")
    expected = amx_tvm.load(bundle.path).generate(prompt, 48)
    assert [int(token) for token in ids] == expected.token_ids
