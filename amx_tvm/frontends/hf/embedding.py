"""A directory of a model that makes embeddings, as sentence-transformers keeps it.

    modules.json                        the chain: Transformer, Pooling, Dense ..., Normalize
    1_Pooling/config.json               which rows of the last hidden states are averaged
    2_Dense/config.json, model.safetensors
    config_sentence_transformers.json   prompts by name
    sentence_bert_config.json           longest text, in tokens

Without modules.json the pooling is sentence-transformers' own: the mean of all rows, of causal
models the last one, not normalized.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, TypedDict

from amx_tvm.embedding import POOLINGS, Dense, EmbeddingSettings
from amx_tvm.errors import ModelError
from amx_tvm.frontends.fields import Width, without_nulls
from amx_tvm.frontends.hf.config import read_json
from amx_tvm.frontends.hf.safetensors_file import SafetensorsFile
from amx_tvm.frontends.hf.source import SINGLE_FILE, HuggingFaceSource
from amx_tvm.schema import INSIDE, Count, Mismatch, conform
from amx_tvm.strict_json import read_json as read_value

MODULES = "modules.json"
_MODES = {  # the flags of older files
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_NAMES = {"lasttoken": "last", "cls": "cls", "mean": "mean"}
_ACTIVATIONS = {"Identity": "", "Tanh": "tanh"}
_NO_LIMIT = 1 << 30  # tokenizers without one write 1e30


class _Module(TypedDict):
    """An entry of modules.json."""

    type: str
    path: str


class _Dense(TypedDict, total=False):
    """2_Dense/config.json."""

    in_features: Width
    out_features: Width
    bias: bool
    activation_function: str
    module_input_name: str


class _Pooling(TypedDict, total=False):
    """1_Pooling/config.json."""

    pooling_mode: str | list[str]
    include_prompt: bool


class _Prompts(TypedDict, total=False):
    """config_sentence_transformers.json."""

    prompts: dict[str, str]
    default_prompt_name: str


class _Limits(TypedDict, total=False):
    """sentence_bert_config.json."""

    max_seq_length: Count
    do_lower_case: bool


def makes_embeddings(directory: Path, config: dict[str, Any]) -> bool:
    """Whether a directory's model makes embeddings: by its modules, or by its architecture."""
    if (directory / MODULES).is_file() or config.get("use_bidirectional_attention"):
        return True
    from amx_tvm.models.registry import find  # with TVM, which readers of files do without

    try:
        find(config)
    except ModelError:
        pass
    else:
        return False
    try:
        find(config, "embedding")
    except ModelError:
        return False
    return True


class EmbeddingSource(HuggingFaceSource):
    """A model of embeddings; beside its weights the dense layers', ``dense.0.weight`` and so on.

    Attributes
    ----------
    settings : EmbeddingSettings
        How texts become vectors.
    dense : list of Dense
        The layers behind the pooling.
    """

    kind = "embedding"

    def __init__(self, directory: str | os.PathLike[str], name: str | None = None) -> None:
        from amx_tvm.models.registry import find

        super().__init__(directory, name)
        self._family = find(self.config, "embedding")  # before anything is said about other files
        self.dense: list[Dense] = []
        pooling, include_prompt, normalize = self._chain()
        self.settings = EmbeddingSettings(
            pooling=pooling,
            include_prompt=include_prompt,
            normalize=normalize,
            **self._prompts(),
            **self._limits(),
        )

    def _read(self, file: str, kind: Any, optional: bool = True) -> dict[str, Any]:
        path = self.directory / file
        values = without_nulls(read_json(path, optional=optional))
        try:
            return {**values, **conform(kind, values)}
        except Mismatch as problem:
            raise ModelError(f"{path}: the field {problem}") from None

    def _chain(self) -> tuple[str, bool, bool]:
        """Read the modules behind the transformer: pooling, its prompts, whether it normalizes."""
        path = self.directory / MODULES
        if not path.is_file():
            causal = any("CausalLM" in name for name in self.config.get("architectures") or ())
            return "last" if causal else "mean", True, False
        try:
            modules = conform(list[_Module], read_value(path, ModelError), "it")
            for module in modules:
                if module["path"]:
                    conform(Annotated[str, INSIDE], module["path"], "path")
        except Mismatch as problem:
            raise ModelError(f"{path}: {problem}") from None
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        dense = kinds[2:-1] if kinds[-1:] == ["Normalize"] else kinds[2:]
        if kinds[:2] != ["Transformer", "Pooling"] or set(dense) - {"Dense"}:
            raise ModelError(
                f"{path} is the chain {', '.join(kinds)}; models are supported with Transformer, "
                "Pooling, any number of Dense, and Normalize or nothing"
            )
        if modules[0]["path"]:
            raise ModelError(
                f"{path} has its transformer in {modules[0]['path']!r}; move its files beside "
                f"{MODULES} and empty the path"
            )
        for module in modules[2 : 2 + len(dense)]:
            self._add_dense(module["path"])
        pooling, include_prompt = self._pooling(modules[1]["path"])
        return pooling, include_prompt, kinds[-1] == "Normalize"

    def _pooling(self, place: str) -> tuple[str, bool]:
        values = self._read(f"{place}/config.json", _Pooling, optional=False)
        given = values.get("pooling_mode")
        if given is None:
            given = [mode for flag, mode in _MODES.items() if values.get(flag)]
        modes = [given] if isinstance(given, str) else given
        if len(modes) != 1 or modes[0] not in _NAMES:
            raise ModelError(
                f"{self.directory / place / 'config.json'} pools by {modes}; models are supported "
                f"with one of {', '.join(POOLINGS)}"
            )
        return _NAMES[modes[0]], values.get("include_prompt", True)

    def _add_dense(self, place: str) -> None:
        """Read a dense layer's sizes and add its weights under names of their own."""
        file = f"{place}/config.json"
        values = self._read(file, _Dense, optional=False)
        for field in ("in_features", "out_features"):
            if field not in values:
                raise ModelError(f"{self.directory / file} has no field {field!r}")
        function = values.get("activation_function", "Tanh").rpartition(".")[2]
        if function not in _ACTIVATIONS or values.get("module_input_name"):
            what = "activation_function" if function not in _ACTIVATIONS else "module_input_name"
            raise ModelError(
                f"{self.directory / file}: {what} is {values[what]!r}; dense layers are supported "
                "on the pooled vector, with Identity or Tanh"
            )
        weights = self.directory / place / SINGLE_FILE
        if not weights.is_file():
            raise ModelError(
                f"{self.directory / place} has no {SINGLE_FILE}; save the model with a newer "
                "sentence-transformers"
            )
        held = SafetensorsFile(weights)
        stem = f"dense.{len(self.dense)}."
        held.tensors = {stem + n.removeprefix("linear."): e for n, e in held.tensors.items()}
        self._files.append(held)
        self._where |= dict.fromkeys(held.tensors, held)
        sizes = values["in_features"], values["out_features"]
        self.dense.append(Dense(*sizes, values.get("bias", True), _ACTIVATIONS[function]))

    def _prompts(self) -> dict[str, Any]:
        values = self._read("config_sentence_transformers.json", _Prompts)
        prompts, default = values.get("prompts", {}), values.get("default_prompt_name")
        if default is not None and default not in prompts:
            raise ModelError(
                f"{self.directory / 'config_sentence_transformers.json'}: default_prompt_name is "
                f"{default!r}, expected one of {', '.join(prompts) or 'none: there are no prompts'}"
            )
        return {"prompts": prompts, "default_prompt": default}

    def _limits(self) -> dict[str, Any]:
        values = self._read("sentence_bert_config.json", _Limits)
        longest = values.get("max_seq_length")
        if longest is None:
            given = read_json(self.directory / "tokenizer_config.json", optional=True)
            most = given.get("model_max_length")
            longest = int(most) if isinstance(most, int | float) and 0 < most < _NO_LIMIT else 0
        context = self._family.configure(self.config).context_length
        return {
            "max_tokens": min(longest or context, context),
            "lower_case": values.get("do_lower_case", False),
        }
