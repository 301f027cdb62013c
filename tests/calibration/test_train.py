"""Training of scales and roundings: the twin of the formats, the start, the gain, the ends."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors

from amx_tvm import formats
from amx_tvm.calibration import (
    Calibration,
    Gptq,
    Plain,
    Recipe,
    RotateValues,
    Smooth,
    Train,
    TrainingDiverged,
    calibrate,
    train,
)
from amx_tvm.calibration.api import _windows
from amx_tvm.calibration.fake import fake_round, rounded
from amx_tvm.calibration.train import Training
from amx_tvm.calibration.trained import table_of
from amx_tvm.compiler import compile as compile_model
from amx_tvm.compiler.compile import calibrated
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import CalibrationError, ModelError
from amx_tvm.formats.four_over_six import four_over_six
from benchmarks.torch_reference import Reference

from .tiny import TinySource

E2M1 = [n for n in formats.names() if formats.get(n).rule is not None]
TRAINED = ["amxfp4", "amxfp4-e4m3", "amxfp4-e4m3-tensor", "nvfp4", "int4"]
START = (RotateValues(), Smooth(), Gptq())


def text(windows: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 64, (windows, 48), generator=torch.Generator().manual_seed(seed))


def divergence(source: TinySource, calibration: Calibration) -> float:
    exact, seen = Reference(source), Reference(source, calibration=calibration)
    total = 0.0
    for ids in text(12, 99):
        log = torch.log_softmax(torch.from_numpy(exact(ids.tolist())), -1)
        other = torch.log_softmax(torch.from_numpy(seen(ids.tolist())), -1)
        total += float((log.exp() * (log - other)).sum(-1).mean())
    return total


@pytest.mark.parametrize("columns", [64, 50])
@pytest.mark.parametrize("better", [False, True], ids=["six", "four over six"])
@pytest.mark.parametrize("name", E2M1)
def test_activations_round_as_the_format_does(name, better, columns):
    fmt = four_over_six(formats.get(name)) if better else formats.get(name)
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (7, 5, columns)) * np.exp(rng.normal(0, 4, (7, 5, 1)))
    x = x.astype(np.float32)
    x[0], x[1, 0], x[2] = 0, np.abs(x[1, 0]), np.round(x[2])
    got = rounded(torch.from_numpy(x), fmt).numpy()
    np.testing.assert_array_equal(got, fmt.quantize_dequantize(x, activation=True))


def test_compiled_rounding_serves_training_and_inference():
    """As in one process that trains a network and then judges it."""
    fmt = four_over_six(formats.get("amxfp4-e4m3-tensor"))
    compiled = torch.compile(rounded, backend="eager")
    for rows, mode in ((64, torch.no_grad), (96, torch.inference_mode)):
        with mode():
            x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
            torch._dynamo.maybe_mark_dynamic(x, 0)
            assert torch.equal(compiled(x, fmt), rounded(x, fmt))


def test_gradient_of_an_activation_passes_straight_through():
    x = torch.randn(3, 64, requires_grad=True)
    fake_round(x, formats.get("amxfp4")).backward(torch.ones(3, 64))
    torch.testing.assert_close(x.grad, torch.ones(3, 64))


@pytest.mark.parametrize("name", TRAINED)
def test_training_stores_what_the_network_computed(name):
    """After weights and scales have moved; a group of zeros, whose scale is 0, gives no NaN."""
    generator = np.random.default_rng(2)
    weight = generator.normal(0, 1, (16, 64)).astype(np.float32)
    weight[3, :32], weight[4, 32:] = 0, np.abs(weight[4, 32:])
    fmt = formats.get(name)
    table = table_of(fmt, {"w": (weight, fmt.quantize(weight))})
    with torch.no_grad():
        table.moved += torch.randn(table.moved.shape, generator=torch.Generator().manual_seed(0))
        table.logs += 0.3
    values = table()["w"]
    values.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in table.parameters())
    ((_, stored),) = table.quantized()
    np.testing.assert_allclose(fmt.dequantize(stored), values.detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_training_starts_at_the_given_codes(name):
    source = TinySource()
    calibration = calibrate(source, name, text(6, 0), "gptq")
    start = calibration.quantized
    table = table_of(formats.get(name), {n: (source.arrays[n], start[n]) for n in start})
    for weight, values in table().items():
        exact = formats.get(name).dequantize(start[weight])
        np.testing.assert_allclose(values.detach().numpy(), exact, rtol=1e-6)
    for weight, stored in table.quantized():
        np.testing.assert_array_equal(stored.codes, start[weight].codes)
        for scale in stored.scales:
            np.testing.assert_array_equal(stored.scales[scale], start[weight].scales[scale])


@pytest.mark.parametrize("quantization", ["amxfp4-w4a4"])
def test_training_comes_closer_to_the_float_model(quantization):
    """Judged by another computation, on text that was not trained on."""
    source = TinySource()
    step = Train(batch=16, at_once=8, rate=3e-3, scale_rate=3e-3)
    ids = text(640, 0)
    before = calibrate(source, quantization, ids[:24], Recipe("start", START))
    after = calibrate(source, quantization, ids, Recipe("train", (*START, step)))
    assert set(after.quantized) == set(before.quantized)
    assert divergence(source, after) < 0.9 * divergence(source, before)


def wild() -> tuple[TinySource, Recipe]:
    step = Train(batch=8, rate=1e6, scale_rate=1e3)
    return TinySource(), Recipe("wild", (*START, step), windows=24)


def test_training_that_diverges_is_an_error_that_holds_its_start():
    source, recipe = wild()
    before = calibrate(source, "amxfp4", text(24, 0), Recipe("start", START, windows=24))
    with pytest.raises(TrainingDiverged, match="diverged at step 1 of 2") as caught:
        calibrate(source, "amxfp4", text(24, 0), recipe)
    after = caught.value.calibration
    assert not caught.value.gained and "no state was better" in str(caught.value)
    for name in before.quantized:
        np.testing.assert_array_equal(after.quantized[name].codes, before.quantized[name].codes)


@pytest.mark.parametrize("lost", [math.nan, math.inf, 9.0])
def test_training_that_diverges_late_is_kept_as_it_was_at_its_best(tmp_path, monkeypatch, lost):
    """`compile` goes on with what training had gained, and says so; without a gain it stops."""
    seen = iter([4.0, 3.0, lost, 4.0, lost])
    monkeypatch.setattr(Training, "validate", lambda _self: next(seen))
    monkeypatch.setattr(train, "CHECKS", 2)
    source, (_, recipe) = TinySource(), wild()
    recipe = replace(recipe, window=16).with_step(rate=1e-3, scale_rate=1e-3)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(chr(48 + n % 60) for n in range(600)))
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(TrainingDiverged, match=r"of 3.0000, is kept") as caught:
        calibrate(source, "amxfp4", path.read_text(), recipe)
    assert caught.value.gained
    with pytest.raises(TrainingDiverged, match="no state was better than the start"):
        calibrated(source, "amxfp4", path, recipe, lambda *_: None, folder)


def test_compile_goes_on_with_what_a_lost_training_had_gained(tmp_path, monkeypatch, caplog):
    seen = iter([4.0, 3.0, math.nan])
    monkeypatch.setattr(Training, "validate", lambda _self: next(seen))
    source, (_, recipe) = TinySource(), wild()
    recipe = replace(recipe, window=16)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(chr(48 + n % 60) for n in range(600)))
    made = calibrated(source, "amxfp4", path, recipe, lambda *_: None, tmp_path / "new")
    assert made.quantized and "3.0000, is kept" in caplog.text


def test_products_are_exact_again_after_training():
    before = torch.get_float32_matmul_precision()
    calibrate(TinySource(), "amxfp4", text(24, 0), Recipe("train", (Plain(), Train())))
    assert torch.get_float32_matmul_precision() == before


def test_too_little_memory_of_a_gpu_is_said(monkeypatch):
    def full(_self: Training, _progress: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(Training, "_train", full)
    with pytest.raises(CalibrationError, match="too little memory .*9 GiB.*recompute=True"):
        calibrate(TinySource(), "amxfp4", text(24, 0), Recipe("train", (Plain(), Train())))


@pytest.mark.parametrize("words", [0, 100, 15 * 16])
def test_a_text_too_short_to_train_on_leaves_nothing(tmp_path, words):
    """No window, fewer than the recipe calibrates on, fewer than training needs."""
    recipe = Recipe("train", (Plain(), Train()), windows=10, window=16)
    path, output = tmp_path / "text.txt", tmp_path / "artifact"
    path.write_text(" ".join(chr(48 + n % 60) for n in range(words)))
    with pytest.raises(CalibrationError, match=r"Give more text"):
        compile_model(TinySource(), calibration=path, recipe=recipe, output=output)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_a_float_model_that_cannot_be_loaded_leaves_nothing(tmp_path):
    """Missing, cut off after its header, and gone when its weights are read."""
    path, output = tmp_path / "text.txt", tmp_path / "artifact"
    path.write_text(" ".join(chr(48 + n % 60) for n in range(600)))
    recipe = Recipe("train", (Plain(), Train()), windows=10, window=16)
    broken = tmp_path / "model.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))

    class Damaged(TinySource):
        def load(self, name: str) -> np.ndarray:
            raise ModelError(f"{name} cannot be read: the file ends too early")

    for model in (tmp_path / "nothing", broken, Damaged()):
        with pytest.raises(ModelError):
            compile_model(model, calibration=path, recipe=recipe, output=output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "text.txt"]


def test_what_cannot_be_trained_is_said():
    source, recipe = TinySource(), Recipe("train", (Gptq(), Train()))
    with pytest.raises(CalibrationError, match="it needs 16 at least"):
        calibrate(source, "amxfp4", text(9, 0), recipe)
    with pytest.raises(CalibrationError, match="no linear of this start can be trained"):
        calibrate(source, "mxfp4", text(20, 0), recipe)
    with pytest.raises(CalibrationError, match="choose recipe best, or leave quantized attention"):
        config = QuantizationConfig("amxfp4", "w4a4", attention=True)
        calibrate(source, config, text(20, 0), recipe)
    with pytest.raises(CalibrationError, match="torch cannot compute on 'toaster'"):
        calibrate(source, "amxfp4", text(20, 0), recipe, device="toaster")


class Starting(TinySource):
    """A model whose tokenizer begins every text with a token of its own, as Gemma's does."""

    def write_tokenizer(self, directory):
        names = super().write_tokenizer(directory)
        path = f"{directory}/tokenizer.json"
        tokenizer = Tokenizer.from_file(path)
        tokenizer.post_processor = processors.TemplateProcessing("o $A", special_tokens=[("o", 63)])
        tokenizer.save(path)
        return names


def test_windows_begin_as_every_text_does():
    recipe = Recipe("train", (Gptq(), Train()), windows=2, window=8)
    document = " ".join(chr(48 + n % 60) for n in range(40))
    for source, first in ((Starting(), [63]), (TinySource(), [0, 8, 16, 20, 24, 32])):
        windows, trained = _windows(source, [document], recipe, 64)
        assert set(windows[:, 0].tolist() + trained[:, 0].tolist()) <= set(first)
