"""torch modules: any module through torch.export, causal language models as checkpoints.

A ``transformers`` model whose architecture the registry knows becomes a source of configuration and
weights and is compiled with the KV cache; any other module becomes one Relax function, called with
arrays. The module's own arrays are used without a copy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.frontends.base import ModelSource, sample_digest
from amx_tvm.frontends.hf.config import normalize, token_ids
from amx_tvm.frontends.hf.tokenizer import has_tokenizer, read_tokenizer
from amx_tvm.frontends.importers.relax_module import RelaxModuleSource

if TYPE_CHECKING:
    import torch


def is_torch_module(model: Any) -> bool:
    """Whether an object is a torch module, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def from_torch(
    module: torch.nn.Module,
    example_inputs: Sequence[Any] | None = None,
    dynamic_shapes: Any = None,
) -> ModelSource:
    """Make a source of a torch module.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode and float32; a ``transformers`` causal language model may have any type.
    example_inputs : sequence of tensor, optional
        Positional inputs, needed for all but causal language models; their shapes are compiled.
    dynamic_shapes : optional
        As ``torch.export.export`` takes it: which dimensions stay free.

    Raises
    ------
    ModelError
        For a module that cannot be exported, or holds an operator that TVM does not import; the
        message names the layer and its source line.
    """
    if example_inputs is None and _is_causal_lm(module):
        return TorchCausalLM(module)
    if example_inputs is None:
        raise ModelError(
            f"compiling the torch module {type(module).__name__} needs example_inputs=(tensor, "
            "...): their shapes are what is compiled (see dynamic_shapes for free ones)"
        )
    return export(module, tuple(example_inputs), dynamic_shapes)


def export(module: torch.nn.Module, inputs: tuple, dynamic_shapes: Any) -> RelaxModuleSource:
    """Export a module and import the graph; see :func:`from_torch`."""
    import torch
    from tvm.relax.frontend.torch import from_exported_program

    from amx_tvm.frontends.importers.imported import source_of

    title = type(module).__name__
    if module.training:
        raise ModelError(f"the torch module {title} is in training mode; call module.eval() first")
    refuse_meta({**dict(module.named_parameters()), **dict(module.named_buffers())}, title)
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise ModelError(
                f"the weight {name!r} of {title} is {weight.dtype}; compile the module in float32 "
                "(module.float())"
            )
    try:
        with torch.no_grad():
            program = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes)
            _add_masks(program)
            program = program.run_decompositions(_decompositions(program))
    except Exception as error:
        first = str(error).strip().splitlines()
        raise ModelError(
            f"torch.export cannot export {title}: {first[0] if first else type(error).__name__}; "
            "rewrite the module without control flow that depends on values"
        ) from error
    _check_operators(program, title)
    imported = from_exported_program(
        program,
        keep_params_as_input=True,
        unwrap_unit_return_tuple=True,
        run_ep_decomposition=False,
    )
    names = dict(program.graph_signature.inputs_to_parameters)
    values = {key: program.state_dict[name] for key, name in names.items()}
    return source_of(imported, values, names, title)


def _decompositions(program: Any) -> Any:
    """Return torch's decompositions without the operators that the passes look for whole.

    torch takes a linear on a strided input apart into a batched product with an expanded weight,
    silu into x * sigmoid(x), and attention into products, a softmax and masks around it; TVM's
    importer knows all three as they are.
    """
    import torch

    aten = torch.ops.aten
    table = torch.export.default_decompositions()
    kept = [aten.linear.default, aten.silu.default]
    attention = aten.scaled_dot_product_attention.default
    if all(_plain_attention(n) for n in program.graph.nodes if n.target is attention):
        kept.append(attention)
    for operator in kept:
        table.pop(operator, None)
    return table


def _add_masks(program: Any) -> None:
    """Let attention add masks of booleans as numbers, which TVM's importer knows alone."""
    import torch

    aten, masked = torch.ops.aten, -1e30  # a row without any key stays finite
    for node in list(program.graph.nodes):
        mask = _mask(node) if node.target is aten.scaled_dot_product_attention.default else None
        if mask is None or mask.meta["val"].dtype is not torch.bool:
            continue
        with program.graph.inserting_before(node):
            added = program.graph.call_function(aten.where.Scalar, (mask, 0.0, masked))
        added.meta["val"] = torch.where(mask.meta["val"], 0.0, masked)
        node.replace_input_with(mask, added)
    program.graph_module.recompile()


def _mask(node: Any) -> Any:
    return (*node.args[3:4], node.kwargs.get("attn_mask"))[0]


def _plain_attention(node: Any) -> bool:
    """Whether TVM's importer knows an attention whole: no scale of its own, masks of four axes."""
    query, scale, mask = node.args[0].meta["val"], node.kwargs.get("scale"), _mask(node)
    dropout = (*node.args[4:5], node.kwargs.get("dropout_p"))[0]
    usual = scale is None or abs(scale * query.shape[-1] ** 0.5 - 1) < 1e-6
    added = mask is None or (mask.meta["val"].is_floating_point() and mask.meta["val"].ndim == 4)
    return usual and added and not (node.kwargs.get("enable_gqa") or dropout) and query.ndim == 4


def _check_operators(program: Any, title: str) -> None:
    """Refuse the first operator that TVM's importer does not know, with where it comes from."""
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    known = ExportedProgramImporter().create_convert_map()
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target.__name__ in known:
            continue
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        layer = stack[-1][0] if stack and stack[-1][0] else title
        lines = [x.strip() for x in (node.meta.get("stack_trace") or "").splitlines() if x.strip()]
        places = [x for x in lines if x.startswith("File ")]
        place = f" ({places[-1]})" if places else ""
        raise ModelError(
            f"the operator {node.target.__name__} in layer {layer!r} of {title}{place} is not "
            "supported; replace it, or compile the parts around it"
        )


def refuse_meta(tensors: dict[str, Any], title: str) -> None:
    """Refuse a module with tensors that have a shape and no values.

    Raises
    ------
    ModelError
        For tensors on torch's device "meta", where accelerate leaves what it keeps elsewhere.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ModelError(
                f"the tensor {name!r} of {title} is on the device 'meta' and has no values; load "
                "the model whole on the CPU (without device_map or offloading)"
            )


def _is_causal_lm(module: Any) -> bool:
    from amx_tvm.models import families

    name = type(module).__name__
    return hasattr(module, "config") and any(name in f.architectures for f in families())


class TorchCausalLM(ModelSource):
    """A ``transformers`` causal language model in memory, as the checkpoint that it would save.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of an architecture in the registry.
    """

    def __init__(self, model: Any) -> None:
        values = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        if isinstance(values.get("vision_config"), dict):
            raise ModelError(
                f"{type(model).__name__} takes images, which its processor prepares; save both "
                "with save_pretrained, and compile the directory"
            )
        self.config = normalize(values)
        origin = str(getattr(model.config, "_name_or_path", "") or "")
        self.name = Path(origin).name or type(model).__name__
        generation = getattr(model, "generation_config", None)
        self.generation_config = dict(generation.to_dict()) if generation is not None else {}
        for key in ("bos_token_id", "eos_token_id"):
            if self.generation_config.get(key) is None:
                self.generation_config[key] = self.config.get(key)
        self.generation_config["eos_token_id"] = token_ids(self.generation_config["eos_token_id"])
        self._tokenizer = None
        if origin and has_tokenizer(Path(origin)):
            self._tokenizer = read_tokenizer(Path(origin))
            self.generation_config = self._tokenizer.generation_config(
                self.generation_config, int(self.config["vocab_size"])
            )
        self._tensors = {name: t.detach() for name, t in model.state_dict().items()}
        refuse_meta(self._tensors, self.name)

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise self.missing(name)
        return self._tensors[name]

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> str:
        """Return the type as torch calls it, such as "bfloat16"."""
        return str(self._tensor(name).dtype).removeprefix("torch.")

    def check(self, name: str) -> None:
        """Refuse a tensor that holds no floats."""
        tensor = self._tensor(name)
        if not tensor.is_floating_point():
            raise ModelError(
                f"the weight {name!r} of {self.name} is {tensor.dtype}; expected floats"
            )

    def same(self, first: str, second: str) -> bool:
        """Return whether two tensors are one, or hold the same values."""
        one, other = self._tensor(first), self._tensor(second)
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return one.data_ptr() == other.data_ptr() or bool((one == other).all())

    def load(self, name: str) -> np.ndarray:
        """Return one tensor as a new float32 array."""
        return np.array(self._tensor(name).float().cpu().numpy())

    def load_entry(self, name: str, index: int) -> np.ndarray:
        """Return one entry of a stacked tensor."""
        return np.array(self._tensor(name)[index].float().cpu().numpy())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self._tensors.values())

    def write_tokenizer(self, directory: str | os.PathLike[str]) -> list[str]:
        """Write the tokenizer of the directory that the model was loaded from, if there is one."""
        return self._tokenizer.write(Path(directory)) if self._tokenizer else []

    def digest(self) -> str:
        """Return a cheap identity: samples of every tensor's values."""
        tensors = (t.reshape(-1)[: 1 << 14].float().cpu() for t in self._tensors.values())
        return sample_digest(*(t.numpy().tobytes() for t in tensors))
