"""A chain of linears (chain.py) in one parallel region, for a few rows of x.

    in one parallel region
        quantize x, each thread some rows                              | all threads wait
        for each linear
            (what larger blocks need, one thread                       | all threads wait)
            for each tile of W, shared out to the threads: y           | all threads wait
            quantize y for the next linear, each thread some rows      | all threads wait
                or, behind silu * up, with the tiles: by_group.py

Linear by linear the threads are started and joined for each, the virtual machine makes seven
tensors in front of it, and the other threads wait meanwhile.
"""

from __future__ import annotations

from typing import Any

from relax_passes.kernels.chain import MOST_ROWS, ChainSpec
from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.activations import quantize_row
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa

from . import by_group
from .direct import Direct, block_notes
from .knobs import CpuKnobs


def linear_chain(spec: ChainSpec, isa: Isa, knobs: tuple[CpuKnobs, ...]) -> Any:
    """Build the PrimFunc.

    Parameters
    ----------
    spec : ChainSpec
        What to compute; its ``buffers()`` are the arguments.
    isa : Isa
        Table lookup and dot product.
    knobs : tuple of CpuKnobs
        For each linear.

    Returns
    -------
    tvm.tirx.PrimFunc
    """
    with e.function(spec.name, spec.buffers(), spec.m) as (buffers, m):
        _Chain(spec, isa, knobs, buffers, m).emit()
    return buffers["func"]


class _Chain:
    """Emits the region; ``stages`` are the buffers that each linear reads and writes."""

    def __init__(
        self, spec: ChainSpec, isa: Isa, knobs: tuple[CpuKnobs, ...], buffers: Any, m: Expr
    ):
        self.spec, self.isa, self.m, self.buffers = spec, isa, m, buffers
        self.stages = self._connect(buffers)
        each = list(zip(spec.stages, knobs, self.stages, strict=True))
        self.notes = [block_notes(s, isa, k, b) for s, k, b in each]
        quantizers = [self._quantizer(i) for i in range(len(each))]
        self.linears = [
            Direct(s, isa, k, b, m, notes, quantizer)
            for (s, k, b), notes, quantizer in zip(each, self.notes, quantizers, strict=True)
        ]

    def _quantizer(self, i: int) -> by_group.GroupQuantizer | None:
        """Make what quantizes a linear's result where it is made, if that can be."""
        if i + 1 == len(self.spec.stages) or not self._by_group(i):
            return None
        scheme, rows = self.spec.quantized[i + 1].scheme, self.spec.m or MOST_ROWS
        to, notes = self.stages[i + 1], self.notes[i + 1]
        return by_group.GroupQuantizer(self.spec.stages[i], scheme, to, rows, notes)

    def _connect(self, buffers: Any) -> list[dict[str, Any]]:
        """Give each linear its arguments, and room in one workspace to what is in between."""
        spec, rows = self.spec, self.spec.m or MOST_ROWS
        inner: list[tuple[int, str, tuple, str]] = []
        for i, stage in enumerate(spec.stages):
            inner += [(i, n, (rows, *s), dtype) for n, s, dtype in stage.activation_buffers()]
            if not spec.kept[i] and not self._by_group(i):
                inner.append((i, "y", (rows, stage.out_features), stage.out_dtype))
        room = e.arena([(shape, dtype) for _, _, shape, dtype in inner])
        stages: list[dict[str, Any]] = [{} for _ in spec.stages]
        for (i, name, _, _), buffer in zip(inner, room, strict=True):
            stages[i][name] = buffer
        for i, own in enumerate(stages):
            own |= {name: buffers[f"{name}_{i}"] for name, _, _ in spec.stage_arguments(i)}
            if spec.kept[i]:
                own["y"] = buffers[f"y_{i}"]
            adds = spec.residuals[i]
            if adds is not None:
                own["residual"] = stages[adds]["y"]
        return stages

    def _by_group(self, i: int) -> bool:
        """Whether a linear's result is quantized where it is made, and not stored."""
        spec = self.spec
        return not spec.kept[i] and by_group.supports(spec.stages[i], spec.quantized[i + 1])

    def emit(self) -> None:
        """Emit the whole function."""
        if self.spec.m is None:
            e.require(self.m <= MOST_ROWS, f"a chain of linears takes at most {MOST_ROWS} rows")
        with e.region():
            self._quantize(0, self.buffers["x"])
            self._notes(0)
            for i, linear in enumerate(self.linears[:-1]):
                with e.barrier_behind():
                    linear.tiles()
                if linear.quantizer is not None:
                    with e.barrier_behind(), e.one_thread():
                        linear.quantizer.list(self.m)
                        self._list(i + 1)
                    continue
                self._quantize(i + 1, self.stages[i]["y"])
                self._notes(i + 1)
            self.linears[-1].tiles()

    def _notes(self, i: int) -> None:
        """Emit what blocks of eight rows need: one thread makes it."""
        notes = self.notes[i]
        if notes is not None:
            with e.when(self.m >= notes.unit), e.then(), e.barrier_behind(), e.one_thread():
                self._list(i)

    def _list(self, i: int) -> None:
        notes = self.notes[i]
        if notes is not None:
            with e.when(self.m >= notes.unit), e.then():
                notes.list(self.m)

    def _quantize(self, i: int, x: Any) -> None:
        """Emit the quantization of x for linear ``i``, a row a thread."""
        stage, how = self.spec.stages[i], self.spec.quantized[i]
        named = {name: self.stages[i][name] for name, _, _ in stage.activation_buffers()}
        named["x"] = x
        if how.prologue == "rms_norm":
            named["weight"] = self.stages[i]["norm"]
        with e.barrier_behind(), e.parallel_rows(self.m) as row:
            quantize_row(row, named, stage.k, how.scheme, how.prologue, how.eps)
            notes = self.notes[i]
            if notes is not None:
                notes.start(row)
