"""The model family registry: architecture name -> configuration reader and Relax module.

One file a family registers itself here; ``find`` is the only way in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from amx_tvm.errors import ModelError
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.weights import EMBEDDING, HEAD, Weight

# Fields of configurations that stand for parts which no family has.
UNKNOWN_PARTS = {
    "shared_expert_intermediate_size": "shared experts (shared_expert_intermediate_size)",
    "mamba_d_state": "state-space layers (mamba_d_state)",
    "state_size": "state-space layers (state_size)",
    "linear_num_value_heads": "linear attention (linear_num_value_heads)",
    "is_encoder_decoder": "encoder (is_encoder_decoder)",
    "vision_config": "vision tower (vision_config)",
    "audio_config": "audio tower (audio_config)",
    "alibi": "ALiBi positions (alibi)",
}


# Classes that wrap a causal language model and were saved as its architecture.
WRAPPERS = ("PeftModelForCausalLM", "OptimizedModule")
_ENDING = re.compile(r"(ForCausalLM|LMHeadModel|DoubleHeadsModel|Model)$")


def same_name(name: str, _config: DecoderConfig) -> Weight:
    """Find a weight under the module's own name."""
    return Weight(name)


@dataclass(frozen=True)
class ModelFamily:
    """A family of models.

    Attributes
    ----------
    name : str
        Short name, as shown by ``amx-tvm inspect``.
    architectures : tuple of str
        Class names in a config's ``architectures`` that this family answers for.
    model_types : tuple of str
        Values of ``model_type``, used where ``architectures`` is missing.
    configure : callable
        Config dictionary -> DecoderConfig; raises ModelError for what the family cannot do.
    build : callable
        DecoderConfig -> the nn.Module, such as ``amx_tvm.models.decoder.CausalLM``.
    weight : callable
        Weight name of the module and DecoderConfig -> the Weight to read from the checkpoint, or
        several, of which the first that is there counts; the one of the same name by default.
    prefix : str
        What checkpoints of the whole model write in front of the base model's weights, and those
        of the base model alone leave out.
    default_special_id : int or None
        What transformers writes as BOS and EOS where nobody set them, whatever the vocabulary.
    kind : str
        "causal_lm", or "embedding" for models that make vectors of texts, whose ``build`` returns
        what :class:`amx_tvm.models.embedding.EmbeddingModel` pools.
    vision : callable or None
        Config dictionary and DecoderConfig -> the :class:`amx_tvm.models.vision.Vision` beside the
        decoder, of families that take images.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    configure: Callable[[dict[str, Any]], DecoderConfig]
    build: Callable[[DecoderConfig], Any]
    weight: Callable[[str, DecoderConfig], Weight | tuple[Weight, ...]] = same_name
    prefix: str = "model."
    default_special_id: int | None = None
    kind: str = "causal_lm"
    vision: Callable[[dict[str, Any], DecoderConfig], Any] | None = None

    def weights(self, name: str, config: DecoderConfig) -> tuple[Weight, ...]:
        """Return where a weight of the module may be, first choice first.

        Every name may lack the prefix. A tied embedding may be stored as the head only.
        """
        if self.kind == "embedding" and name.startswith("dense."):
            return (Weight(name),)
        found = self.weight(name, config)
        places = list(found) if isinstance(found, tuple) else [found]
        places += [
            replace(place, name=place.name.removeprefix(self.prefix))
            for place in places
            if place.name.startswith(self.prefix)
        ]
        if name == EMBEDDING and config.tie_embeddings:
            places.append(Weight(HEAD))
        return tuple(places)

    def stored(self, name: str, config: DecoderConfig, present: Collection[str]) -> Weight | None:
        """Return where a weight of the module is among the tensors that are there, or None."""
        places = self.weights(name, config)
        return next((place for place in places if place.name in present), None)

    def answers_for(self, architecture: str) -> bool:
        """Whether a class name, with a known model_type, stands for this family's decoder.

        That are the base model ("LlamaModel"), old spellings ("LLaMAForCausalLM") and wrappers
        ("PeftModelForCausalLM"), but not models for other tasks.
        """
        stems = [_ENDING.sub("", known).lower() for known in self.architectures]
        stems += [kind.replace("_", "") for kind in self.model_types]
        plain = _ENDING.sub("", architecture.removeprefix("FSDP")).lower()
        return architecture in WRAPPERS or plain in stems


_FAMILIES: dict[str, ModelFamily] = {}


def register(family: ModelFamily) -> ModelFamily:
    """Add a family; its name must be new."""
    if family.name in _FAMILIES:
        raise ValueError(f"model family {family.name!r} is registered twice")
    _FAMILIES[family.name] = family
    return family


def by_name(name: str) -> ModelFamily:
    """Return the family of a name."""
    return _FAMILIES[name]


def families(kind: str = "causal_lm") -> list[ModelFamily]:
    """Return all families of a kind by name."""
    return [_FAMILIES[name] for name in sorted(_FAMILIES) if _FAMILIES[name].kind == kind]


def find(config: dict[str, Any], kind: str = "causal_lm") -> ModelFamily:
    """Return the family of a config dictionary, among those of a kind.

    Raises
    ------
    ModelError
        For an unknown architecture, with the nearest supported one.
    """
    wanted, all_known = list(config.get("architectures") or []), families(kind)
    for family in all_known:
        if any(name in family.architectures for name in wanted):
            return family
    for family in all_known:
        if config.get("model_type") in family.model_types and (
            not wanted or any(family.answers_for(str(name)) for name in wanted)
        ):
            return family
    given = wanted[0] if wanted else config.get("model_type")
    if not given:
        raise ModelError(
            "the configuration names neither 'architectures' nor 'model_type'; expected one of "
            + ", ".join(a for f in all_known for a in f.architectures)
        )
    known = [a for f in all_known for a in f.architectures + f.model_types]
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.3)
    hint = f"; the nearest supported one is {near[0]}" if near else ""
    lacking = [words for field, words in UNKNOWN_PARTS.items() if config.get(field)]
    if lacking:
        hint += "; no family here has its " + ", ".join(dict.fromkeys(lacking))
    what = "architecture" if kind == "causal_lm" else f"as a model of kind {kind}, architecture"
    raise ModelError(
        f"{what} {given!r} is not supported{hint} (supported: "
        + ", ".join(a for f in all_known for a in f.architectures)
        + ")"
    )
