"""SmolVLM and Idefics3: SigLIP over tiles of an image, whose patches are joined by blocks.

A block of ``scale_factor`` times as many patches becomes one row of the prompt: their features one
behind the other, through one linear.
"""

from __future__ import annotations

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from amx_tvm.errors import ModelError
from amx_tvm.images import Tiles
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader
from amx_tvm.models.image_reader import ImageReader
from amx_tvm.models.registry import register
from amx_tvm.models.vision import Places, Tower, TowerConfig, Vision, image_family

_DEFAULTS = {  # of transformers, which configurations leave out
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-6,
}


class JoinedPatches(nn.Module):
    """A tower whose patches are joined by blocks of block * block, in the order of lines."""

    def __init__(self, tower: TowerConfig, block: int, width: int) -> None:
        self.config, self.block, self.patches = tower, block, tower.values
        self.tower = Tower(tower)
        self.projector = nn.Linear(block**2 * tower.hidden_size, width, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches [tiles, patches, values] to rows of a prompt [tiles * rows, width]."""
        tiles, block, hidden = patches.shape[0], self.block, self.config.hidden_size
        side = self.config.edge // self.config.patch // block
        x = op.reshape(self.tower(patches), (tiles, side, block, side, block, hidden))
        x = op.permute_dims(x, (0, 1, 3, 2, 4, 5))
        return self.projector(op.reshape(x, (tiles * side**2, block**2 * hidden)))


def vision(read: ConfigReader, decoder: DecoderConfig) -> Vision:
    """Read what stands beside the decoder."""
    seen = read.inside("vision_config", _DEFAULTS)
    tower = TowerConfig.read(seen, activation=seen.activation(default="gelu_pytorch_tanh"))
    block, side = int(read.get("scale_factor", 2)), tower.edge // tower.patch
    if side % block:
        raise ModelError(
            f"scale_factor is {block}, and a tile has {side} x {side} patches; expected a divisor"
        )
    images = ImageReader(read)
    processing = Tiles(
        tile=images.size("max_image_size", "longest_edge", tower.edge),
        longest=images.size("size", "longest_edge"),
        split=images.flag("do_image_splitting", True),
        resample=images.resample,
    )
    rows = (side // block) ** 2
    settings = images.settings(read.require("image_token_id"), tower, rows, processing)
    return Vision(JoinedPatches(tower, block, decoder.hidden_size), settings)


register(
    image_family(
        name="smolvlm",
        architectures=("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"),
        model_types=("smolvlm", "idefics3"),
        vision=vision,
        places=Places(
            text={"model.": ("model.text_model.",), "lm_head.": ("lm_head.",)},
            tower=("model.vision_model.",),
            projector=("model.connector.",),
            names={"projector": "modality_projection.proj"},
        ),
    )
)
