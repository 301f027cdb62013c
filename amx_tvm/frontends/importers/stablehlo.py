"""StableHLO modules (text or portable bytecode, as jax.export writes them) to Relax.

The module is parsed with jaxlib's MLIR bindings and translated operation by operation
(:mod:`.stablehlo_operations`); private functions that the entry calls are translated in place.
TVM 0.27 has an importer of its own, which needs an older jaxlib and knows neither calls nor
constants of weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.extras import install
from amx_tvm.frontends.importers.relax_module import RelaxModuleSource

ENTRY = "main"
LIFTED = 1024  # constants from this many elements on are weights
# A module of a few bytes can describe tensors of any size, and calls that double its length.
MOST_ELEMENTS = 1 << 32  # of one tensor
MOST_SPLAT_BYTES = 1 << 28  # of all constants of one value together
MOST_OPERATIONS = 1 << 20
MOST_CALLS, MOST_BRACKETS = 64, 200
MOST_BYTES = 1 << 31
# Operations that stand for a function, and their attribute with its name.
CALLS = {"func.call": "callee", "stablehlo.composite": "decomposition"}
_BYTECODE = b"ML\xefR"
_BRACKETS = re.compile(r'"(?:[^"\\\n]|\\.)*"|->|[][(){}<>]')
_NAME = re.compile(r'^loc\("([^"/]+)"')
DTYPES = {
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "i1": "bool",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "ui8": "uint8",
    "ui32": "uint32",
}


def looks_like(path: Path) -> bool:
    """Whether a file is a StableHLO module, by its name or its first bytes."""
    if path.suffix in (".mlir", ".stablehlo"):
        return True
    with path.open("rb") as handle:
        return handle.read(4) == _BYTECODE


def from_stablehlo(
    module: str | bytes, params: Mapping[str, Any] | None = None, name: str = "stablehlo"
) -> RelaxModuleSource:
    """Import a module with the function "main".

    Parameters
    ----------
    module : str or bytes
        StableHLO text, or the portable bytecode (``Exported.mlir_module_serialized``).
    params : mapping of str to array, optional
        Values of arguments that are weights, by the argument's name as its location says it
        (``p['w']`` for an entry of JAX's dictionary p) or "arg0", "arg1", ... Without it, weights
        are the module's large constants and every argument is an input.
    name : str
        Name of the model.

    Raises
    ------
    ModelError
        When jaxlib is missing, the text cannot be parsed, a shape is dynamic, or an operation is
        not supported; the message has the operation and its source location.
    """
    ir, parsed = _parse(module, name)  # the parsed module must outlive its operations
    functions = {
        ir.StringAttr(op.attributes["sym_name"]).value: op
        for op in parsed.body.operations
        if "sym_name" in op.attributes and op.operation.name == "func.func"
    }
    if ENTRY not in functions:
        raise ModelError(f"{name} has no function {ENTRY!r}; it has {', '.join(functions)}")
    try:
        return _Import(ir, functions, dict(params or {}), name).source()
    except ModelError:
        raise
    except Exception as error:  # of many kinds: attributes that MLIR lacks, types that TVM refuses
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name} is no StableHLO module that can be imported: {first}") from error


def _check_text(text: str, name: str) -> None:
    """Refuse brackets that are nested too deeply: MLIR's parser would overflow its stack."""
    depth = 0
    for match in _BRACKETS.finditer(text):
        if match[0] in "([{<":
            depth += 1
            if depth > MOST_BRACKETS:
                raise ModelError(f"{name} nests brackets deeper than {MOST_BRACKETS} levels")
        elif match[0] in ")]}>":
            depth = max(0, depth - 1)


def _parse(module: str | bytes, name: str) -> tuple[Any, Any]:
    """Parse a module; return the MLIR bindings and the module."""
    try:
        from jax._src.interpreters import mlir as jax_mlir  # the only maker of a full context
        from jaxlib.mlir import ir
        from jaxlib.mlir._mlir_libs import _stablehlo
    except ImportError as error:
        raise ModelError(
            f"reading StableHLO needs jax and jaxlib ({error}); install them: "
            f"{install('stablehlo')}"
        ) from None
    context = jax_mlir.make_ir_context()
    try:
        with context:
            if isinstance(module, bytes) and module.startswith(_BYTECODE):
                return ir, _stablehlo.deserialize_portable_artifact(context, module)
            text = module.decode() if isinstance(module, bytes) else module
            _check_text(text, name)
            return ir, ir.Module.parse(text, context)
    except ModelError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or ["?"])[0]
        raise ModelError(f"{name} cannot be parsed as StableHLO: {first}") from None


class _Import:
    """Builds the Relax function; one instance a module."""

    def __init__(self, ir: Any, functions: dict[str, Any], params: dict, title: str) -> None:
        from tvm import relax

        self.ir, self.functions, self.params, self.title = ir, functions, params, title
        self.relax, self.builder = relax, relax.BlockBuilder()
        self.weights: dict[str, tuple[Any, np.ndarray]] = {}
        self.calls: list[str] = []
        self.operations = self.splat_bytes = 0

    def tensor_type(self, value_type: Any) -> tuple[list[int], str]:
        """Return shape and dtype of a ranked tensor type."""
        shaped = self.ir.RankedTensorType(value_type)
        element = str(shaped.element_type)
        if not shaped.has_static_shape:
            raise ModelError(
                f"{self.title} has the dynamic type {value_type}; export it with fixed shapes"
            )
        if element not in DTYPES:
            raise ModelError(
                f"{self.title} holds {element} elements; known are {', '.join(DTYPES)}"
            )
        shape = list(shaped.shape)
        if math.prod(shape) > MOST_ELEMENTS:
            raise ModelError(f"{self.title} has the type {value_type}, which no machine can hold")
        return shape, DTYPES[element]

    def source(self) -> RelaxModuleSource:
        """Translate the entry."""
        from relax_passes.rewriting import function_scope

        relax, entry = self.relax, self.functions[ENTRY]
        block = entry.regions[0].blocks[0]
        names, inputs, variables = [], [], []
        for index, argument in enumerate(block.arguments):
            shape, dtype = self.tensor_type(argument.type)
            found = _NAME.match(str(argument.location))
            label = found[1] if found else f"arg{index}"
            given = label if label in self.params else f"arg{index}"
            var = relax.Var(label if label not in names else given, relax.TensorType(shape, dtype))
            names.append(label)
            variables.append(var)
            if given in self.params:
                self.weights[var.name] = (var, np.asarray(self.params.pop(given)))
            else:
                inputs.append(var)
        if self.params:
            raise ModelError(
                f"{self.title} has no arguments {', '.join(self.params)}; it has {', '.join(names)}"
            )
        # Constants become parameters while the body is translated, so parameters come last.
        params = inputs + [v for v, _ in self.weights.values()]
        with function_scope(self.builder, ENTRY, params):
            with self.builder.dataflow():
                results = self.body(block, variables)
                whole = results[0] if len(results) == 1 else relax.Tuple(results)
                output = self.builder.emit_output(whole)
            self.builder.emit_func_output(output)
        module = self.builder.finalize()
        function = module[ENTRY]
        params = [*inputs, *(v for v, _ in self.weights.values())]
        module[ENTRY] = relax.Function(params, function.body, function.ret_ty, attrs=function.attrs)
        values = {name: value for name, (_, value) in self.weights.items()}
        return RelaxModuleSource(module, values, name=self.title)

    def body(self, block: Any, arguments: list[Any]) -> list[Any]:
        """Translate a block's operations; return what it returns."""
        from amx_tvm.frontends.importers.stablehlo_operations import TRANSLATE, Operation

        values = dict(zip(block.arguments, arguments, strict=True))
        for op in block.operations:
            operands = [values[operand] for operand in op.operands]
            kind = op.operation.name
            self.operations += 1
            if self.operations > MOST_OPERATIONS:
                raise ModelError(
                    f"{self.title} has more than {MOST_OPERATIONS} operations, calls' included"
                )
            if kind in ("func.return", "stablehlo.return"):
                return operands
            if kind in CALLS:
                callee = self.ir.FlatSymbolRefAttr(op.attributes[CALLS[kind]]).value
                if len(self.calls) == MOST_CALLS or callee not in self.functions:
                    raise ModelError(
                        f"{self.title} calls {callee!r}, which is no function of it or calls itself"
                    )
                self.calls.append(f", called at {op.location}")
                results = self.body(self.functions[callee].regions[0].blocks[0], operands)
                self.calls.pop()
            elif kind == "stablehlo.constant":
                results = [self.constant(op)]
            elif kind in TRANSLATE:
                shape, dtype = self.tensor_type(op.results[0].type)
                made = TRANSLATE[kind](Operation(self.ir, op, operands, shape, dtype))
                calls = made if isinstance(made, list) else [made]
                results = [self.builder.emit(call) for call in calls]
            else:
                raise ModelError(
                    f"the operation {kind} in {self.title} (at {op.location}"
                    f"{''.join(reversed(self.calls))}) is not supported"
                )
            values.update(zip(op.results, results, strict=True))
        raise ModelError(f"{self.title} has a function without a return")

    def constant(self, op: Any) -> Any:
        """Make a constant, or a weight of a large float32 one."""
        shape, dtype = self.tensor_type(op.results[0].type)
        attribute = self.ir.DenseElementsAttr(op.attributes["value"])
        if attribute.is_splat:
            element = attribute.get_splat_value()
            value = getattr(element, "value", element)
            self.splat_bytes += math.prod(shape) * np.dtype(dtype).itemsize
            if self.splat_bytes > MOST_SPLAT_BYTES:
                raise ModelError(
                    f"{self.title} fills more than {MOST_SPLAT_BYTES >> 20} MiB with constants of "
                    "one value; let a broadcast make them"
                )
            array = np.full(shape, bool(value) if dtype == "bool" else value, dtype)
        else:
            array = np.array(attribute).astype(dtype).reshape(shape)
            if dtype == "float32" and array.size >= LIFTED:
                name = f"constant_{len(self.weights)}"
                var = self.relax.Var(name, self.relax.TensorType(shape, dtype))
                self.weights[name] = (var, array)
                return var
        return self.relax.const(array, dtype)
