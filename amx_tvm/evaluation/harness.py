"""Multiple-choice and other standard tasks: an engine as a model of the `lm-eval` package.

    from amx_tvm.evaluation.harness import run_tasks
    run_tasks(engine, ["arc_easy", "hellaswag"], limit=100)

`EngineModel` implements the three requests of lm-eval's `LM` (0.4): log-likelihood of a
continuation, rolling log-likelihood of a text, and greedy generation until a stop text. What is too
long for the context is cut from the left, as lm-eval's own models do, and a warning says so. The
package is imported only by `run_tasks`, so the model can be used, and tested, without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from amx_tvm.errors import EvaluationError
from amx_tvm.evaluation.metrics import log_softmax
from amx_tvm.evaluation.windows import Protocol, Window, cut
from amx_tvm.extras import require
from amx_tvm.runtime.options import number

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # names that tasks use
_COUNT = number(1, whole=True, error=EvaluationError)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class EngineModel:
    """An engine that answers lm-eval's requests, one at a time.

    Parameters
    ----------
    engine : Engine
    max_new_tokens : most tokens that a generation may add where the task sets no limit
    """

    def __init__(self, engine: Any, max_new_tokens: int = 256) -> None:
        self.engine, self.max_new_tokens = engine, max_new_tokens
        self._shortened = 0

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood, and whether it is the greedy one.

        A context that is empty stands for the beginning of a text: the BOS or EOS token.
        """
        results = [self._continuation(*request.args[:2]) for request in requests]
        self._tell()
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For each text: the log-likelihood of all of it, in windows of the engine's context."""
        return [self._rolling(request.args[0]) for request in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For each (prompt, options): the continuation up to a stop text, greedy by default.

        Raises
        ------
        EvaluationError
            For an option that engines do not have, and where the context has no room for a prompt.
        """
        results = []
        for request in requests:
            prompt, options = request.args[:2]
            given = generation_options(options, self.max_new_tokens)
            size, limit = self.engine.context_length, given["max_new_tokens"]
            if limit >= size:
                raise EvaluationError(
                    f"the task asks for {limit} new tokens and the context is {size}, which leaves "
                    "no room for a prompt; load the engine with a longer context"
                )
            ids = self._cut(self.engine.encode(prompt) or [self._first()], size - limit)
            results.append(self.engine.generate(ids, **given).text)
        self._tell()
        return results

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """Return the last tokens that have room, and note where some had none."""
        self._shortened += len(ids) > room
        return ids[-room:]

    def _tell(self) -> None:
        """Say how many requests were cut since the last time."""
        if self._shortened:
            warnings.warn(
                f"{self._shortened} requests were longer than the context of "
                f"{self.engine.context_length} tokens and were cut from the left",
                stacklevel=3,
            )
        self._shortened = 0

    def _first(self) -> int:
        model = self.engine.manifest.model
        first = model.get("bos_token_id")
        return int(first if first is not None else model["eos_token_ids"][0])

    def _continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        # Trailing spaces belong to the continuation: tokenizers glue them to the next word.
        kept = context.rstrip()
        whole = self.engine.encode(context + continuation)
        before = self.engine.encode(kept) if kept else []
        start = _common(before, whole) if kept else 0
        if start == 0:
            whole, start = [self._first(), *whole], 1
        if start >= len(whole):
            raise EvaluationError(
                f"the continuation {continuation!r} adds no token to its context; the task does "
                "not fit this tokenizer"
            )
        # The last token is only predicted, so one more than the context has room.
        ids = self._cut(whole, self.engine.context_length + 1)
        start -= len(whole) - len(ids)
        if start < 1:
            raise EvaluationError(
                f"a continuation of {len(whole) - start} tokens does not fit the context of "
                f"{self.engine.context_length}; load the engine with a longer one"
            )
        targets = np.asarray(ids[start:])
        logp = log_softmax(self.engine.logits(ids[:-1])[start - 1 :])
        total = float(np.take_along_axis(logp, targets[:, None], axis=-1).sum())
        return total, bool((logp.argmax(axis=-1) == targets).all())

    def _rolling(self, text: str) -> float:
        ids = [self._first(), *self.engine.encode(text)]
        size = self.engine.context_length
        total = 0.0
        # Windows overlap by one token: the last of one is the first of the next.
        step = Protocol(window=size, stride=size - 1)
        windows = cut(ids, step) if len(ids) >= size else []
        done = windows[-1].ids.size + (len(windows) - 1) * step.step if windows else 1
        if done < len(ids):
            windows.append(Window(np.asarray(ids[done - 1 :]), 1))
        for window in windows:
            logp = log_softmax(self.engine.logits(window.ids.tolist())[:-1])
            total += float(np.take_along_axis(logp, window.ids[1:, None], axis=-1).sum())
        return total


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def generation_options(given: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Return a task's options as keywords of ``Engine.generate``; None means the default.

    Parameters
    ----------
    given : mapping
        "until", a limit, "do_sample" and sampling options; without ``do_sample`` or a temperature
        the most likely tokens are taken.
    max_new_tokens : int
        The limit where the task has none.

    Raises
    ------
    EvaluationError
        For an option that engines do not have, or a value of the wrong type.
    """
    if not isinstance(given, Mapping):
        raise EvaluationError(f"the task's options are {given!r}, expected a mapping")
    options = {name: value for name, value in given.items() if value is not None}
    until = options.pop("until", ())
    limits = [_COUNT(name, options.pop(name)) for name in _LIMITS if name in options]
    sample = options.pop("do_sample", "temperature" in options)
    if not isinstance(sample, bool):
        raise EvaluationError(f"do_sample is {sample!r}, expected true or false")
    unknown = sorted(set(options) - {*_SAMPLING, "num_beams"})
    if options.pop("num_beams", 1) != 1 or unknown:
        raise EvaluationError(
            f"the task asks for {unknown[0] if unknown else 'beam search'}, which engines do not "
            f"have; known are until, do_sample, {', '.join((*_LIMITS, *_SAMPLING))}"
        )
    if not sample:
        options = {n: v for n, v in options.items() if n == "repetition_penalty"}
    else:
        options.setdefault("temperature", 1.0)
    stop = (until,) if isinstance(until, str) else until
    if not isinstance(stop, list | tuple) or not all(isinstance(t, str | type(None)) for t in stop):
        raise EvaluationError(f"until is {until!r}, expected a text or a list of texts")
    return {
        **options,
        "max_new_tokens": limits[0] if limits else max_new_tokens,
        "stop": tuple(text for text in stop if text),
    }


def run_tasks(engine: Any, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    """Run tasks of the lm-eval package; returns its results by task.

    Parameters
    ----------
    engine : Engine
    tasks : names that lm-eval knows
    options : passed to ``lm_eval.simple_evaluate``, such as num_fewshot and limit

    Raises
    ------
    EvaluationError
        When lm-eval is not installed, or a package that only some of its tasks need.
    """
    lm_eval = require_lm_eval()
    model = adapter(engine)
    try:
        return lm_eval.simple_evaluate(model=model, tasks=list(tasks), **options)["results"]
    except ImportError as reason:
        raise EvaluationError(
            f"the tasks {', '.join(map(str, tasks))} need what cannot be imported ({reason}); "
            "lm-eval's README names the packages of each task"
        ) from None


def require_lm_eval() -> Any:
    """Import the lm-eval package.

    Raises
    ------
    EvaluationError
        When it is not installed.
    """
    return require("lm_eval", "tasks", "a standard task", EvaluationError)


def adapter(engine: Any) -> Any:
    """Make the object that lm-eval takes as a model: `EngineModel` as one of its `LM` classes."""
    from lm_eval.api.model import LM

    class EngineLM(EngineModel, LM):
        """An engine in lm-eval's class hierarchy, which keeps rank, device and caches there."""

        def __init__(self) -> None:
            LM.__init__(self)
            EngineModel.__init__(self, engine)

    return EngineLM()
