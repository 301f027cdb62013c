"""Every family that takes images against transformers: pixels, text, logits, generations."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_vision
import torch

import amx_tvm
from amx_tvm import formats
from amx_tvm.compiler.compile import compile as compile_model
from amx_tvm.compiler.lowered import lower_source
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ModelError
from amx_tvm.frontends import open_model
from amx_tvm.models import families
from amx_tvm.targets import resolve

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = [(100, 60), (33, 97), (7, 31), (64, 64), (301, 17), (129, 128)]
PROMPTS = {
    "none": ("w5 w6 w7", []),
    "one": ("w5<image>w6 w7", [(100, 60)]),
    "two": ("<image>w5 w6<image>w7", [(33, 97), (301, 17)]),
}


def test_every_family_has_a_case():
    known = sorted(family.name for family in families() if family.vision is not None)
    assert known == sorted(tiny_vision.CASES)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_the_processors(made, size):
    image = tiny_vision.picture(*size)
    settings = made.engine.images
    expected = np.asarray(made.processor.image_processor(image, return_tensors="np").pixel_values)
    edge, patch = settings.edge, settings.patch
    side = edge // patch
    got = settings.pixels(settings.prepare(image, "<image>").tiles)
    got = got.reshape(-1, side, side, 3, patch, patch).transpose(0, 3, 1, 4, 2, 5)
    np.testing.assert_array_equal(
        got.reshape(-1, 3, edge, edge), expected.reshape(-1, 3, edge, edge)
    )


def compare(model, processor, engine, name, most=1e-4):
    """Hold a greedy generation's log-probabilities against torch's, token by token."""
    text, sizes = PROMPTS[name]
    images = [tiny_vision.picture(*size, seed=i) for i, size in enumerate(sizes)]
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    prompt = engine.request(text, images=images).prompt
    assert prompt == inputs["input_ids"][0].tolist()
    options = {"logprobs": 20, "ignore_eos": True, "logit_bias": {tiny_vision.IMAGE: -100}}
    found = engine.generate(text, 8, images=images, **options)
    inputs["input_ids"] = torch.tensor([[*prompt, *found.token_ids]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    rows = tiny_vision.logits(model, inputs)[len(prompt) - 1 : -1]
    expected = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    for entry, row in zip(found.logprobs, expected, strict=True):
        others = np.where(np.arange(row.size) == tiny_vision.IMAGE, -np.inf, row)
        assert entry.token == others.argmax()
        for token, value in entry.top:
            assert abs(value - row[token]) < most
    return found


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_equal_torch(made, name):
    found = compare(made.model, made.processor, made.engine, name)
    assert (found.timings.image_s > 0) == bool(PROMPTS[name][1])


def test_amxfp4_with_a_tower_of_8_bits_equals_the_rounded_model(made, tmp_path):
    artifact = amx_tvm.compile(made.directory, strict=True, output=tmp_path / "out")
    linears = {one["name"]: one["spec"]["format"] for one in artifact.manifest.linears}
    seen = {name: kind for name, kind in linears.items() if name.startswith("vision.")}
    assert seen.pop("vision.tower.patch_embed") == "none"
    assert set(seen.values()) == {"int8"} and "amxfp4" in linears.values()
    model, _ = tiny_vision.load(made.family, made.directory)
    with torch.no_grad():
        for name, module in model.named_modules():
            ends = name.endswith(("lm_head", "embed_tokens"))
            if ends or isinstance(module, torch.nn.Linear):
                text = "text_model" in name or "language_model" in name
                fmt = formats.get("amxfp4" if text and not ends else "int8")
                rounded = fmt.dequantize(fmt.quantize(module.weight.numpy()))
                module.weight.copy_(torch.from_numpy(rounded))
    compare(model, made.processor, amx_tvm.load(artifact.path), "one")


def test_chunks_batches_and_a_full_cache_change_nothing(made):
    text, sizes = PROMPTS["two"]
    images = [tiny_vision.picture(*size, seed=i) for i, size in enumerate(sizes)]
    expected = made.engine.generate(text, 8, images=images, ignore_eos=True).token_ids
    engine = amx_tvm.load(made.artifact, max_sequences=4, kv_tokens=256, speculation=True)
    with engine.scheduler(prefill_rows=7) as scheduler:
        words = scheduler.add(engine.request("w5 w6", max_new_tokens=30, ignore_eos=True))
        asked = {"max_new_tokens": 8, "ignore_eos": True}
        handles = [scheduler.add(engine.request(text, images=images, **asked)) for _ in range(3)]
        while scheduler.step():
            pass
    alone = made.engine.generate("w5 w6", 30, ignore_eos=True).token_ids
    assert words.result.token_ids == alone
    assert [handle.result.token_ids for handle in handles] == [expected] * 3


def test_the_same_image_is_seen_once_and_its_keys_are_shared(made):
    engine = amx_tvm.load(made.artifact, max_sequences=4)
    one, other = (tiny_vision.picture(100, 60, seed=seed) for seed in (0, 1))

    def ask(image, text="w5<image>w6"):
        handle = scheduler.add(engine.request(text, images=[image], max_new_tokens=4))
        while scheduler.step():
            pass
        return handle.result

    with engine.scheduler(keep=2) as scheduler:
        first = ask(one)
        again = ask(one, "w5<image>w6 w7")
        different = ask(other)
    assert first.timings.image_s > 0 and again.timings.image_s == 0
    assert again.timings.prefill_tokens <= 2 < different.timings.prefill_tokens
    assert different.timings.image_s > 0
    with_text = made.engine.generate("w5<image>w6 w7", 4, images=[one])
    assert again.token_ids == with_text.token_ids


def test_the_example_asks_about_a_file(made, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "picture.png"
    tiny_vision.picture(33, 97).save(picture)
    monkeypatch.setattr(sys, "argv", ["image_question", str(made.artifact), str(picture), "w5"])
    runpy.run_path(str(EXAMPLES / "image_question.py"), run_name="__main__")
    said = capsys.readouterr().out
    engine, prompt = made.engine, "User:<image>w5\nAssistant:"
    expected = engine.generate(prompt, max_new_tokens=48, images=[picture]).text.strip()
    assert said.startswith(f"{expected}\nseen in ") and said.endswith(" s\n")


def test_a_gpu_is_refused_before_any_work(made):
    config = QuantizationConfig().resolve("cuda")
    with pytest.raises(ModelError, match="takes images, which is compiled for CPUs only"):
        lower_source(open_model(made.directory), resolve("cuda:sm_90a"), config)
    with pytest.raises(ModelError, match="takes images, which no bundle runs"):
        amx_tvm.export(made.directory, "llvm:x86-64-v3", made.directory / "no", runtimes=())


def test_a_model_without_its_processor_is_refused(made, tmp_path):
    for file in made.directory.iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ModelError, match="no object 'image_processor'; expected one, as prepr"):
        compile_model(tmp_path, output=tmp_path / "out")
