"""Towers that see: a vision transformer over patches of square tiles, and what joins it to text.

A family of image models says what it has of this in one :class:`Vision`: the module that makes rows
of a prompt of patches, and how images become patches. Tiles lie one behind the other, [tiles *
rows, features], and attend each inside itself. SigLIP and CLIP are one transformer with other ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tvm import te
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from amx_tvm.images import ImageSettings
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader
from amx_tvm.models.decoder import ACTIVATIONS
from amx_tvm.models.registry import ModelFamily, by_name, find
from amx_tvm.models.step import PackedStep
from amx_tvm.models.weights import Weight
from relax_passes.attention_spec import AttentionSpec

PREFIX = "vision."  # of the names of everything that sees
_ACTIVATIONS = {**ACTIVATIONS, "quick_gelu": lambda x: x * op.sigmoid(x * 1.702)}


@dataclass(frozen=True)
class TowerConfig:
    """The shape of a vision transformer.

    Parameters
    ----------
    hidden_size, intermediate_size, num_layers, num_heads : int
        Features, features inside an MLP, layers that are run, heads.
    edge, patch : int
        Pixels of a tile's and of a patch's edge.
    norm_eps : float
        Of the norms.
    activation : str
        Of the MLPs: "gelu", "gelu_tanh" or "quick_gelu".
    class_token : bool
        A learned row stands in front of a tile's patches.
    norm_before, norm_behind : bool
        Whether there is a norm in front of the first layer, and behind the last.
    patch_bias : bool
        The patches' linear has a bias.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    edge: int
    patch: int
    norm_eps: float
    activation: str
    class_token: bool = False
    norm_before: bool = False
    norm_behind: bool = True
    patch_bias: bool = True

    @property
    def values(self) -> tuple[int, int]:
        """Patches of a tile, and a patch's values."""
        return (self.edge // self.patch) ** 2, 3 * self.patch**2

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.values[0] + self.class_token

    @staticmethod
    def read(read: ConfigReader, **differences: Any) -> TowerConfig:
        """Read a configuration's fields; ``differences`` are those that the family knows."""
        return TowerConfig(
            hidden_size=read.require("hidden_size"),
            intermediate_size=read.require("intermediate_size"),
            num_heads=read.require("num_attention_heads"),
            edge=read.require("image_size"),
            patch=read.require("patch_size"),
            norm_eps=read.require("layer_norm_eps", float),
            **{"num_layers": read.require("num_hidden_layers"), **differences},
        )


class TowerAttention(nn.Module):
    """Attention among the rows of a tile."""

    def __init__(self, config: TowerConfig, layer: int) -> None:
        hidden, heads = config.hidden_size, config.num_heads
        size = hidden // heads
        self.spec = AttentionSpec(layer, heads, heads, size, size**-0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, hidden) for _ in range(3))
        self.o_proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, step: PackedStep) -> Tensor:
        """Attend: x [rows, hidden] -> [rows, hidden]."""
        rows, spec = x.shape[0], self.spec
        qkv = op.concat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        qkv = op.reshape(qkv, (rows, 3 * spec.heads, spec.head_dim))
        return self.o_proj(op.reshape(step.attend(spec, qkv), (rows, -1)))


class TowerLayer(nn.Module):
    """Attention and MLP with norms in front."""

    def __init__(self, config: TowerConfig, layer: int) -> None:
        hidden = config.hidden_size
        self.activation = _ACTIVATIONS[config.activation]
        self.attn_norm = nn.LayerNorm(hidden, config.norm_eps)
        self.self_attn = TowerAttention(config, layer)
        self.mlp_norm = nn.LayerNorm(hidden, config.norm_eps)
        self.up_proj = nn.Linear(hidden, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, hidden)

    def forward(self, x: Tensor, step: PackedStep) -> Tensor:
        """Map the residual stream [rows, hidden] to the next one."""
        x = self.self_attn(self.attn_norm(x), step) + x
        return self.down_proj(self.activation(self.up_proj(self.mlp_norm(x)))) + x


class Tower(nn.Module):
    """A vision transformer: patches of tiles in, hidden states out."""

    def __init__(self, config: TowerConfig) -> None:
        self.config, hidden = config, config.hidden_size
        self.patch_embed = nn.Linear(config.values[1], hidden, bias=config.patch_bias)
        self.positions = nn.Parameter((config.rows, hidden))
        self.first = nn.Parameter((hidden,)) if config.class_token else None
        self.norm_before = nn.LayerNorm(hidden, config.norm_eps) if config.norm_before else None
        self.layers = nn.ModuleList([TowerLayer(config, i) for i in range(config.num_layers)])
        self.norm_behind = nn.LayerNorm(hidden, config.norm_eps) if config.norm_behind else None

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches [tiles, patches, values] to hidden states [tiles, rows, hidden]."""
        tiles, count, values = patches.shape
        config, hidden = self.config, self.config.hidden_size
        rows = tiles * config.rows
        x = self.patch_embed(op.reshape(patches, (tiles * count, values)))
        x = op.reshape(x, (tiles, count, hidden))
        if self.first is not None:
            x = op.concat([op.broadcast_to(self.first, (tiles, 1, hidden)), x], dim=1)
        x = op.reshape(x + self.positions, (rows, hidden))
        x = x if self.norm_before is None else self.norm_before(x)
        step = PackedStep(op.zeros((rows,), "int32"), _bounds(patches, config.rows), False)
        for layer in self.layers:
            x = layer(x, step)
        x = x if self.norm_behind is None else self.norm_behind(x)
        return op.reshape(x, (tiles, config.rows, hidden))


def _bounds(patches: Tensor, rows: int) -> Tensor:
    """Return where tiles of so many rows begin, and the end, int32 [tiles + 1]."""

    def ends(x: te.Tensor) -> te.Tensor:
        return te.compute((x.shape[0] + 1,), lambda i: (i * rows).astype("int32"), name="ends")

    return op.tensor_expr_op(ends, "tile_ends", [patches])


@dataclass(frozen=True)
class Vision:
    """What an image model has beside its decoder.

    Attributes
    ----------
    module : nn.Module
        Maps patches [tiles, patches, values] to rows of a prompt [tiles * rows, decoder's hidden];
        ``patches`` are the last two sizes.
    settings : ImageSettings
        How images become patches, and where their rows stand.
    """

    module: nn.Module
    settings: ImageSettings


@dataclass(frozen=True)
class Places:
    """Where a checkpoint has the weights of an image model.

    Attributes
    ----------
    text : dict of str to tuple of str
        What may stand in place of the beginnings of a decoder's names.
    tower, projector : tuple of str
        What may stand in front of the tower's names, and of what is behind it.
    names : dict of str to str
        Names behind the tower, without "weight" and "bias".
    """

    text: Mapping[str, tuple[str, ...]]
    tower: tuple[str, ...]
    projector: tuple[str, ...]
    names: Mapping[str, str]

    def of(self, name: str, config: DecoderConfig) -> tuple[Weight, ...]:
        """Return where a weight of the module may be, first choice first."""
        if name.startswith(PREFIX + "tower."):
            return self._of_tower(name.removeprefix(PREFIX + "tower."))
        if name.startswith(PREFIX):
            stem, _, kind = name.removeprefix(PREFIX).rpartition(".")
            return tuple(Weight(f"{p}{self.names[stem]}.{kind}") for p in self.projector)
        found = by_name(config.family).weight(name, config)
        places = found if isinstance(found, tuple) else (found,)
        return tuple(
            replace(place, name=begin + place.name.removeprefix(start))
            for place in places
            for start, begins in self.text.items()
            if place.name.startswith(start)
            for begin in begins
        )

    def _of_tower(self, name: str) -> tuple[Weight, ...]:
        if name == "positions":
            found, flat = "embeddings.position_embedding.weight", False
        elif name == "first":
            found, flat = "embeddings.class_embedding", False
        elif name == "patch_embed.weight":
            found, flat = "embeddings.patch_embedding.weight", True
        else:
            stem, _, kind = name.rpartition(".")
            layer = ""
            if stem.startswith("layers."):
                _, number, stem = stem.split(".", 2)
                layer = f"encoder.layers.{number}."
            found, flat = f"{layer}{_NAMES.get(stem, stem)}.{kind}", False
        return tuple(Weight(prefix + found, flat=flat) for prefix in self.tower)


_NAMES = {
    "patch_embed": "embeddings.patch_embedding",
    "attn_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "self_attn.o_proj": "self_attn.out_proj",
    "up_proj": "mlp.fc1",
    "down_proj": "mlp.fc2",
    "norm_behind": "post_layernorm",
    "norm_before": "pre_layrnorm",  # as CLIP's checkpoints have it
}


def image_family(
    name: str,
    architectures: tuple[str, ...],
    model_types: tuple[str, ...],
    vision: Callable[[ConfigReader, DecoderConfig], Vision],
    places: Places,
) -> ModelFamily:
    """Return a family whose decoder is another family's, which its configuration names.

    Parameters
    ----------
    name, architectures, model_types
        As of `ModelFamily`.
    vision : callable
        Makes what stands beside the decoder, of the whole configuration and the decoder's shape.
    places : Places
        Where the weights are.
    """

    def configure(values: dict[str, Any]) -> DecoderConfig:
        kind = (values.get("text_config") or {}).get("model_type")
        text = {**values, "architectures": None, "model_type": kind}
        return find(text).configure(text)

    return ModelFamily(
        name=name,
        architectures=architectures,
        model_types=model_types,
        configure=configure,
        build=lambda decoder: by_name(decoder.family).build(decoder),
        weight=places.of,
        vision=lambda values, decoder: vision(ConfigReader(values), decoder),
    )
