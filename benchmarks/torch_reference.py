"""The fake-quantized network in torch: what a compiled model should compute, and a quick judge.

Weights are dequantized to float32, linear inputs rounded as the configuration says, everything else
is float32. Token ids in, logits out, as `amx_tvm.evaluation.measure` takes them, so a recipe can be
judged without compiling. All weights stay in memory, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from amx_tvm import formats
from amx_tvm.calibration.api import Calibration
from amx_tvm.calibration.attention import attention_of
from amx_tvm.calibration.block import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Rope,
    layer_name,
    open_decoder,
    rms_norm,
    run,
    stages,
)
from amx_tvm.calibration.stream import attention_format, fake_quantizer
from amx_tvm.config import QuantizationConfig
from amx_tvm.frontends import ModelSource


class Reference:
    """A model under a quantization configuration, with calibrated weights where they are given.

    Parameters
    ----------
    source : ModelSource
    config : QuantizationConfig or str
        "none" is the float network. Four-bit activations are rounded, all others are exact. The
        embedding and the head stay in float32 whatever `config.head` says.
    calibration : Calibration, optional
        Its configuration takes the place of `config`.
    device : str
        A torch device.
    """

    def __init__(
        self,
        source: ModelSource,
        config: QuantizationConfig | str = "none",
        calibration: Calibration | None = None,
        device: str = "cpu",
    ) -> None:
        self.device = device
        self.config = (
            QuantizationConfig.parse(config) if calibration is None else calibration.config
        )
        source, self.decoder = open_decoder(source)
        self.embedding = torch.from_numpy(source.load(EMBEDDING)).to(device)
        tied = self.decoder.tie_embeddings
        self.head = self.embedding if tied else torch.from_numpy(source.load(HEAD)).to(device)
        self.norm = torch.from_numpy(source.load(FINAL_NORM)).to(device)
        self.layers = [
            self._layer(source, layer, calibration) for layer in range(self.decoder.num_layers)
        ]
        self.fakes = [fake_quantizer(self.config, n) for n in range(self.decoder.num_layers)]
        self.attend = attention_of(attention_format(self.config))

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """Logits float32 [n, vocab] of token ids [n]; row i follows tokens 0..i."""
        return self.logits(ids).cpu().numpy()

    def loss(self, ids: Sequence[int], first: int) -> float:
        """Mean loss in nats of tokens `first` and later, each predicted from those before it."""
        logits = self.logits(ids)[first - 1 : -1]
        wanted = torch.tensor(list(ids[first:]), device=self.device)
        return float(functional.cross_entropy(logits, wanted))

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits float32 [n, vocab] on the device."""
        x = self.embedding[torch.tensor([list(ids)])] * self.decoder.embedding_scale
        for layer, (weights, fake) in enumerate(zip(self.layers, self.fakes, strict=True)):
            rope = Rope(self.decoder, layer, len(ids), self.device)
            x = run(stages(x, weights, self.decoder, rope, fake, self.attend))
        hidden = rms_norm(x[0], self.norm, self.decoder.stream_eps)
        return hidden @ self.head.T

    def _layer(
        self, source: ModelSource, layer: int, calibration: Calibration | None
    ) -> dict[str, Tensor]:
        prefix = layer_name(layer, "")
        return {
            name.removeprefix(prefix): torch.from_numpy(self._array(source, name, calibration)).to(
                self.device
            )
            for name in source.names()
            if name.startswith(prefix)
        }

    def _array(self, source: ModelSource, name: str, calibration: Calibration | None) -> np.ndarray:
        if calibration is not None:
            if name in calibration.quantized:
                quantized = calibration.quantized[name]
                return quantized.format.dequantize(quantized)
            if name in calibration.floats:
                return calibration.floats[name].copy()
        array = source.load(name)
        wanted = self.config.linear(name.removesuffix(".weight")).format
        if wanted == "none" or array.ndim != 2 or calibration is not None:
            return array
        return formats.get(wanted).quantize_dequantize(array, name=name)
