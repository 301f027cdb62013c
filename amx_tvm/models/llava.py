"""LLaVA 1.5: CLIP over one square, an early layer's hidden states through two linears."""

from __future__ import annotations

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from amx_tvm.errors import ModelError
from amx_tvm.images import Crop
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader
from amx_tvm.models.decoder import ACTIVATIONS
from amx_tvm.models.image_reader import ImageReader
from amx_tvm.models.registry import register
from amx_tvm.models.vision import Places, Tower, TowerConfig, Vision, image_family

_ACTS = ("quick_gelu", "gelu")
_DEFAULTS = {  # of transformers, which configurations leave out
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
}


class ProjectedPatches(nn.Module):
    """A tower whose patches become a row each; its first ``skipped`` rows are left out."""

    def __init__(self, tower: TowerConfig, skipped: int, activation: str, width: int) -> None:
        self.rows, self.skipped, self.patches = tower.rows - skipped, skipped, tower.values
        self.activation = ACTIVATIONS[activation]
        self.tower = Tower(tower)
        self.up = nn.Linear(tower.hidden_size, width)
        self.down = nn.Linear(width, width)

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches [tiles, patches, values] to rows of a prompt [tiles * rows, width]."""
        x = self.tower(patches)
        if self.skipped:
            _, x = op.split(x, [self.skipped], axis=1)
        x = op.reshape(x, (patches.shape[0] * self.rows, x.shape[2]))
        return self.down(self.activation(self.up(x)))


def vision(read: ConfigReader, decoder: DecoderConfig) -> Vision:
    """Read what stands beside the decoder."""
    seen = read.inside("vision_config", _DEFAULTS)
    seen.only("model_type", {"clip_vision_model": None}, "clip_vision_model")
    layers, layer = seen.require("num_hidden_layers"), read.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or not 0 < layer % (layers + 1):
        raise ModelError(
            f"vision_feature_layer is {layer!r}; expected one of {layers} layers, of CLIP's "
            "embeddings none"
        )
    tower = TowerConfig.read(
        seen,
        num_layers=layer % (layers + 1),
        activation=seen.only("hidden_act", {one: one for one in _ACTS}, "quick_gelu"),
        class_token=True,
        norm_before=True,
        norm_behind=False,
        patch_bias=False,
    )
    strategy = "vision_feature_select_strategy"
    skipped = read.only(strategy, {"default": 1, "full": 0}, "default")
    read.only("multimodal_projector_bias", {True: None}, True)
    images = ImageReader(read)
    images.only("do_center_crop", {True: None}, True)
    images.only("do_pad", {False: None}, False)
    images.size("crop_size", "width", tower.edge)
    processing = Crop(
        shortest=images.size("size", "shortest_edge", tower.edge),
        edge=images.size("crop_size", "height", tower.edge),
        resample=images.resample,
    )
    token = read.get("image_token_index", read.get("image_token_id", 32000))
    settings = images.settings(token, tower, tower.rows - skipped, processing)
    activation = read.activation("projector_hidden_act", "gelu")
    module = ProjectedPatches(tower, skipped, activation, decoder.hidden_size)
    return Vision(module, settings)


register(
    image_family(
        name="llava",
        architectures=("LlavaForConditionalGeneration",),
        model_types=("llava",),
        vision=vision,
        places=Places(
            text={
                "model.": ("language_model.model.", "model.language_model."),
                "lm_head.": ("language_model.lm_head.", "lm_head."),
            },
            tower=("vision_tower.vision_model.", "model.vision_tower.", "vision_tower."),
            projector=("multi_modal_projector.", "model.multi_modal_projector."),
            names={"up": "linear_1", "down": "linear_2"},
        ),
    )
)
