"""A space as MetaSchedule sees it: sampled decisions, annotated on a block, expanded by a schedule.

The schedules of this project are factories: knobs in, a finished PrimFunc out. So a decision is not
a transformation of loops, it is an annotation,

    v = sch.sample_categorical([0, 512, 1024, ...], weights)
    sch.annotate(block, "amx.prefetch", v)

on the one block of a small carrier function, and whoever builds the candidate reads the annotations
and calls the factory with them. All of MetaSchedule works on it: traces, mutation, replay,
structural deduplication, the evolutionary search. A trace is some 0.4 kB of JSON and does not
depend on the kernel's code, so it replays as long as the knobs exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain
from typing import Any

from tuning.spaces import Space

BLOCK = "kernel"
PREFIX = "amx."
MOST = 2**31 - 1  # of a knob


@cache
def carrier() -> Any:
    """Return the IRModule whose block carries the annotations."""
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main"})
            with T.sblock(BLOCK):
                T.reads()
                T.writes()
                T.evaluate(0)
    return tvm.IRModule({"main": builder.get()})


def sampler(space: Space) -> Callable[..., None]:
    """Return the design space of a kernel: a function of a tvm.s_tir.Schedule that samples it.

    With a point as its second argument the function decides for that point.
    """

    def sample(schedule: Any, decisions: Mapping[str, int] | None = None) -> None:
        block = schedule.get_sblock(BLOCK)
        for name, values in space.knobs.items():
            decision = values.index(decisions[name]) if decisions is not None else None
            # MetaSchedule takes relative weights; equal ones
            value = schedule.sample_categorical(list(values), [1.0] * len(values), decision)
            schedule.annotate(block, PREFIX + name, value)

    return sample


def knobs_of(schedule: Any) -> dict[str, int]:
    """Return the knobs that a schedule of the carrier was annotated with."""
    annotations = schedule.get(schedule.get_sblock(BLOCK)).annotations
    return {
        str(name).removeprefix(PREFIX): int(value)
        for name, value in annotations.items()
        if str(name).startswith(PREFIX)
    }


def schedule_of(space: Space, knobs: Mapping[str, Any]) -> Any:
    """Return a schedule of the carrier that decides for one point; see ``trace_of``."""
    from tvm.s_tir import Schedule

    schedule = Schedule(carrier())
    sampler(space)(schedule, {**space.default, **knobs})
    return schedule


def trace_of(space: Space, knobs: Mapping[str, int]) -> list[Any]:
    """Return the JSON trace of one point; knobs that are not named keep their defaults.

    Raises
    ------
    ValueError
        For a value that the space does not have.
    """
    return _plain(schedule_of(space, knobs).trace.as_json())


def replay(trace: Any) -> dict[str, int]:
    """Return the knobs that a JSON trace decides, whoever wrote it.

    TVM takes what it is given: a decision outside its values ends the process. So the values and
    decisions are read here, and the trace has to be the very one that TVM writes for them.

    Raises
    ------
    ValueError
        For anything that is no trace of such a space.
    """
    try:
        instructions, decisions = trace
        values = [tuple(i[2][0]) for i in instructions if i[0] == "SampleCategorical"]
        names = [i[2][0].removeprefix(PREFIX) for i in instructions if i[0] == "Annotate"]
        spaces = dict(zip(names, values, strict=True))
        places = [place for _, place in decisions]
        for number in (*places, *chain(*values)):
            if type(number) is not int or not 0 <= number <= MOST:
                raise ValueError(f"{number!r} is no integer from 0 to {MOST}")
        knobs = {n: spaces[n][place] for n, place in zip(spaces, places, strict=True)}
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"its trace does not replay: {str(error)[:200]}") from error
    if trace_of(Space(spaces, knobs, ()), knobs) != trace:
        raise ValueError("its trace does not replay: it does more than to decide for knobs")
    return knobs


def _plain(value: Any) -> Any:
    """Turn TVM's containers and immediates into what json can write."""
    if isinstance(value, (str, int, float)) or value is None:
        return str(value) if isinstance(value, str) else value
    if hasattr(value, "value"):  # IntImm, FloatImm
        return value.value
    if hasattr(value, "__iter__"):
        return [_plain(v) for v in value]
    return str(value)
