"""Calibration of torch modules from example inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amx_tvm import formats
from amx_tvm.calibration import calibrate_module
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import CalibrationError


class Mixer(nn.Module):
    """Two linears of one input and one behind them; a linear that nothing calls."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(64, 96), nn.Linear(64, 96)
        self.out, self.unused = nn.Linear(96, 32), nn.Linear(64, 64)

    def forward(self, x):
        return self.out(torch.tanh(self.left(x)) * self.right(x))


def inputs(seed, count=256):
    """Correlated inputs, so that errors can cancel."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(count, 64, generator=generator)
    return torch.randn(count, 8, generator=generator) @ mixing + 0.1 * noise


def deviation(module, rounded, x):
    """Relative squared error of the outputs with rounded weights."""
    with torch.no_grad():
        expected = module(x)
        kept = {name: value.clone() for name, value in module.state_dict().items()}
        module.load_state_dict({**kept, **rounded})
        got = module(x)
        module.load_state_dict(kept)
    return float((got - expected).square().sum() / expected.square().sum())


def test_outputs_are_closer_than_rounded_to_nearest():
    torch.manual_seed(0)
    module = Mixer().eval()
    made = calibrate_module(module, [(inputs(1),), (inputs(2),)], "amxfp4")
    assert sorted(made.quantized) == ["left.weight", "out.weight", "right.weight"]
    fmt = formats.get("amxfp4")
    calibrated = {k: torch.from_numpy(fmt.dequantize(q)) for k, q in made.quantized.items()}
    weights = dict(module.named_parameters())
    nearest = {
        k: torch.from_numpy(fmt.dequantize(fmt.quantize(weights[k].detach().numpy())))
        for k in calibrated
    }
    fresh = inputs(3)
    assert deviation(module, calibrated, fresh) < 0.7 * deviation(module, nearest, fresh)


def test_ignored_linears_are_left_and_others_get_their_format():
    config = QuantizationConfig(ignored=("left",), overrides={"out": "int8"})
    made = calibrate_module(Mixer().eval(), [(inputs(1),)], config, "plain")
    found = {name: value.format.name for name, value in made.quantized.items()}
    assert found == {"right.weight": "amxfp4", "out.weight": "int8"}


def test_errors_say_what_fits():
    module = Mixer().eval()
    with pytest.raises(CalibrationError, match="none were given"):
        calibrate_module(module, [])
    with pytest.raises(CalibrationError, match="decoder blocks.*plain, search or gptq"):
        calibrate_module(module, [(inputs(1),)], recipe="best")
