"""A model as its files say it, all together: where weights and flags disagree, weights count.

* A stored head that differs from the embedding is used, whatever ``tie_word_embeddings`` says
  (transformers 5 does the same; llama.cpp ties where no head is stored).
* Biases that are stored are used, whatever ``attention_bias`` says. transformers drops them with a
  warning; llama.cpp, whose files have no such flag, uses each that is there, which is followed.
* What the configuration asks for and the weights lack is an error that names it and the way out.
"""

from __future__ import annotations

from collections.abc import Mapping

from amx_tvm.errors import ModelError
from amx_tvm.frontends.base import ModelSource
from amx_tvm.frontends.family_source import FamilySource
from amx_tvm.models.config import BIAS_GROUPS, STORED_BIASES, DecoderConfig
from amx_tvm.models.config_reader import check_shape
from amx_tvm.models.registry import ModelFamily, find
from amx_tvm.models.weights import EMBEDDING, HEAD, Weight


def identify(source: ModelSource) -> tuple[ModelFamily, DecoderConfig]:
    """Return the family of a model and its shape, by its configuration and its weights.

    ``source.config`` is brought in line with the weights, so that whoever reads it later (a
    manifest, a quantized checkpoint) builds the same model.

    Raises
    ------
    ModelError
        For an unknown architecture, or a field that the family cannot follow.
    """
    family = find(source.config)
    decoder = check_shape(family.configure(source.config))
    if source.module_names:
        return family, decoder
    check_layers(source, family, decoder)
    present = set(source.names())

    def stored(name: str) -> Weight | None:
        return family.stored(name, decoder, present)

    changes: dict[str, object] = {}
    head, table = stored(HEAD), stored(EMBEDDING)
    if decoder.tie_embeddings and head and table and not source.same(head.name, table.name):
        changes["tie_word_embeddings"] = False
    groups = [
        group
        for group, parts in BIAS_GROUPS.items()
        if not getattr(decoder, f"{group}_bias")
        and any(
            stored(f"model.layers.{layer}.{part}.bias")
            for layer in range(decoder.num_layers)
            for part in parts
        )
    ]
    if groups:
        changes[STORED_BIASES] = groups
    if not changes:
        return family, decoder
    source.config.update(changes)
    return family, family.configure(source.config)


def open_weights(
    source: ModelSource,
    family: ModelFamily,
    decoder: DecoderConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> FamilySource:
    """Return a checkpoint's weights under the module's names, checked but not read.

    Parameters
    ----------
    source, family, decoder
        The checkpoint, and what :func:`identify` says it is.
    shapes : mapping of str to tuple of int
        Every weight that the module needs, with its shape. Other tensors of the checkpoint
        (buffers, parts of other models) are never looked at.

    Raises
    ------
    ModelError
        When a weight is missing, or has another shape or a type that is not read; the first one
        is named.
    """
    check_layers(source, family, decoder)
    named = FamilySource(source, family, decoder, shapes)
    present = set(named.names())
    for name, shape in shapes.items():
        if name not in present:
            raise ModelError(
                f"{source.name} holds no weight {name!r}, which its configuration asks for; "
                + _way_out(name)
            )
        if tuple(named.shape(name)) != shape:
            raise ModelError(
                f"{source.name}: {name} has shape {list(named.shape(name))}, the "
                f"configuration asks for {list(shape)}"
            )
        named.check(name)
    return named


def _way_out(name: str) -> str:
    """Say what can be done about a missing weight."""
    if name == HEAD:
        return (
            'if the model\'s head is its embedding, set "tie_word_embeddings" to true in '
            "config.json; otherwise this is a base model without a head: use the checkpoint of "
            "the causal language model"
        )
    if name.endswith(".bias"):
        return (
            'if the model has no such bias, set "attention_bias" or "mlp_bias" to false in '
            "config.json; otherwise the checkpoint is incomplete: download or copy it again"
        )
    return "the checkpoint is incomplete (download or copy it again) or of another architecture"


def check_layers(source: ModelSource, family: ModelFamily, decoder: DecoderConfig) -> None:
    """Refuse a checkpoint that has fewer layers than its configuration says."""
    last = f"model.layers.{decoder.num_layers - 1}.self_attn.o_proj.weight"
    names = source.names()
    places = (Weight(last),) if source.module_names else family.weights(last, decoder)
    if any(place.name in names for place in places):
        return
    wanted = places[0].name
    stem = wanted.removeprefix(family.prefix)
    near = [name for name in names if name.endswith("." + stem)]
    if any(".lora_" in name for name in names):
        hint = (
            "it holds LoRA adapters: compile their base model with --adapter, or merge them "
            "(merge_and_unload) first"
        )
    elif near:
        hint = f"it holds {near[0]!r}: rename its tensors to begin as {wanted!r} does"
    else:
        hint = "the checkpoint is incomplete or of another architecture"
    raise ModelError(
        f"{source.name} says it has {decoder.num_layers} layers but holds no {wanted!r}; {hint}"
    )
