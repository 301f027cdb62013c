"""`evaluate`: one artifact against a text, and `compare`: several formats of one model.

The engine's path needs what the runtime needs and nothing more. `compare` compiles, so it needs the
compiler; a reference may be a torch model, which then brings torch along.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from amx_tvm.documents import read_text
from amx_tvm.errors import EvaluationError
from amx_tvm.evaluation.measure import Logits, Progress, Result, measure, torch_logits
from amx_tvm.evaluation.overlap import overlap
from amx_tvm.evaluation.windows import Protocol, cut
from amx_tvm.runtime.options import number
from amx_tvm.scratch import scratch

PUBLISHED = Protocol(window=2048)


def evaluate(
    artifact: Any,
    text: str | os.PathLike[str] | Sequence[int],
    *,
    reference: Any = None,
    protocol: Protocol = PUBLISHED,
    start: int = 0,
    calibration: str | os.PathLike[str] | None = None,
    name: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Measure a compiled model on a text.

    Parameters
    ----------
    artifact : path or Engine
        What `amx_tvm.compile` made, or it loaded.
    text : path, or token ids
        A text file or data set directory (`amx_tvm.evaluation.text`), or a list of token ids.
    reference : path, Engine or torch model, optional
        KL divergence and top-1 agreement are measured against it.
    protocol : Protocol
        Window, stride and limit; by default independent windows of 2048 tokens.
    start : int
        Characters of the text to skip.
    calibration : path, optional
        The text the model was calibrated on; a warning says when the test text is part of it. By
        default the one that the manifest names, where that file still exists.
    name : str, optional
        How the result is called; by default the artifact's directory.
    device, threads
        As for `amx_tvm.load`; only for paths.
    progress : callable, optional
        Called with (done, total, text).

    Returns
    -------
    Result

    Raises
    ------
    EvaluationError
        Too little text, a vocabulary that does not fit, a context shorter than the window.
    """
    start = number(0, whole=True, error=EvaluationError)("start", start or 0)
    engine = _engine(artifact, protocol, device, threads)
    vocab = int(engine.manifest.model["vocab_size"])
    ids = _ids(engine, text, start)
    if calibration is None:
        made = engine.manifest.quantization.get("recipe", {})
        calibration = made.get("text") if os.path.exists(made.get("text", "")) else None
    if calibration is not None:
        _warn_overlap(engine, ids, calibration)
    bits = engine.manifest.quantization.get("bits_per_weight")
    return measure(
        engine.logits,
        cut(ids, protocol, vocab),
        reference=_reference(reference, protocol, vocab, device, threads),
        name=name or Path(engine.path).name,
        bits=None if bits is None else float(bits),
        progress=progress,
    )


def compare(
    model: Any,
    formats: Sequence[str],
    text: str | os.PathLike[str] | Sequence[int],
    *,
    target: str = "llvm",
    protocol: Protocol = PUBLISHED,
    start: int = 0,
    against: str | None = "none",
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Compile a model in several formats and measure each; artifacts are deleted afterwards.

    Parameters
    ----------
    model : as for `amx_tvm.compile`
    formats : quantization names, such as "amxfp4", "amxfp4-w4a4", "nvfp4", "int4"
    text, protocol, start : as for `evaluate`
    against : quantization that serves as the reference, "none" being float32; None: no reference
    options : more arguments of `amx_tvm.compile`; a calibration leaves the reference as it is

    Returns
    -------
    list of Result
        The reference first where there is one, then the formats in their order.
    """
    from amx_tvm.compiler import compile as compile_model

    order = ([against] if against is not None else []) + [f for f in formats if f != against]
    results: list[Result] = []
    with scratch("amx-compare-") as folder:
        known = None
        for index, quantization in enumerate(order):
            place = folder / str(index)
            if progress is not None:
                progress(0, 1, f"{quantization}: compile")
            given = dict(options or {})
            if quantization == "none":
                given = {k: v for k, v in given.items() if k not in ("calibration", "recipe")}
            compile_model(model, target=target, quantization=quantization, output=place, **given)
            engine = _engine(place, protocol, None, None)
            results.append(
                evaluate(
                    engine,
                    text,
                    reference=known,
                    protocol=protocol,
                    start=start,
                    name="float32" if quantization == "none" else quantization,
                    progress=progress,
                )
            )
            if index == 0 and against is not None:
                known = engine
    return results


def settings(protocol: Protocol, text: Any, **more: Any) -> dict[str, Any]:
    """Return what a JSON report should say about how it was made."""
    source = os.fspath(text) if isinstance(text, str | os.PathLike) else "token ids"
    return {"text": source, **asdict(protocol), **more}


def _engine(artifact: Any, protocol: Protocol, device: str | None, threads: int | None) -> Any:
    if not isinstance(artifact, str | os.PathLike):
        engine = artifact
    else:
        from amx_tvm.runtime import load

        engine = load(Path(artifact), device, context_length=None, threads=threads)
        longest = getattr(engine, "context_length", None)
        if longest is not None and longest < protocol.window:
            most = int(engine.manifest.model["context_length"])
            if most >= protocol.window:
                engine = load(Path(artifact), device, protocol.window, threads)
    if getattr(engine, "context_length", None) is None:
        raise EvaluationError(
            f"{artifact} is a compiled function, not a language model; it has no perplexity"
        )
    if engine.context_length < protocol.window:
        raise EvaluationError(
            f"the window has {protocol.window} tokens, but the context of {engine.path} is "
            f"{engine.context_length}; choose a smaller window"
        )
    return engine


def _ids(engine: Any, text: str | os.PathLike[str] | Sequence[int], start: int) -> Sequence[int]:
    given: Any = text
    if isinstance(given, str | os.PathLike):
        return engine.encode(read_text(given)[start:])
    if isinstance(given, bytes) or not isinstance(given, Sequence | np.ndarray):
        raise EvaluationError(f"the text is {given!r}, expected a path or token ids")
    return list(given)


def _reference(
    reference: Any, protocol: Protocol, vocab: int, device: str | None, threads: int | None
) -> Logits | None:
    if reference is None:
        return None
    if isinstance(reference, str | os.PathLike) or hasattr(reference, "logits"):
        engine = _engine(reference, protocol, device, threads)
        other = int(engine.manifest.model["vocab_size"])
        if other != vocab:
            raise EvaluationError(
                f"the reference has a vocabulary of {other} tokens, the model one of {vocab}; "
                "they must share their tokenizer"
            )
        return engine.logits
    if hasattr(reference, "parameters"):
        return torch_logits(reference)
    if callable(reference):
        return reference
    raise EvaluationError(
        f"a reference of type {type(reference).__name__} was given; expected an artifact's path, "
        "an engine, a torch model, or a function from token ids to logits"
    )


def _warn_overlap(engine: Any, ids: Sequence[int], calibration: str | os.PathLike[str]) -> None:
    share = overlap(engine.encode(read_text(calibration)), ids)
    if share > 0.01:
        warnings.warn(
            f"{share:.0%} of the test text occurs in the calibration text {calibration}; the "
            "result flatters the model, so test on other text",
            stacklevel=3,
        )
