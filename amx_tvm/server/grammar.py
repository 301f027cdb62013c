"""Answers that are held to a form: a JSON schema, a regular expression or a grammar.

llguidance compiles the form and says before each token which ones may follow; the sampler chooses
among them. Compiling happens beside the event loop, and a form that it refuses is a 400: nothing is
generated without what was asked for.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import llguidance

from amx_tvm.runtime import Engine
from amx_tvm.server.errors import ApiError
from amx_tvm.server.masks import Mask
from amx_tvm.server.schemas import closed

# At most one blank: small models fill JSON with endless ones where it allows them.
_WHITESPACE: Any = {"whitespace_pattern": r"\x20?"}
_AT_ONCE = 2  # forms that are compiled at once: the steps need the cores too
_KEPT_TEXT = 1 << 18  # characters of the forms that are kept, all together


@dataclass(frozen=True)
class Form:
    """What an answer has to look like.

    Attributes
    ----------
    kind : str
        "json_schema", "regex" or "grammar" (Lark, with llguidance's additions).
    source : object
        The schema as parsed JSON, or the text.
    param : str
        The field of the request that asks for it.
    """

    kind: str
    source: Any
    param: str

    @cached_property
    def key(self) -> str:
        """All of it, as one text."""
        return json.dumps([self.kind, self.source, self.param])


class Forms:
    """Compiles forms for one engine's vocabulary."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._vocabulary = int(engine.manifest.model["vocab_size"])
        self._compiling = asyncio.Semaphore(_AT_ONCE)
        self._kept: OrderedDict[str, Matcher] = OrderedDict()
        self._beside = ThreadPoolExecutor(1, "masks")  # which starts its thread when it has work

    async def compile(self, form: Form) -> Matcher:
        """Return the matcher of a form; ApiError 400 where it is none that can be held.

        Programs ask for one form again and again: those asked for last are kept.
        """
        if form.key not in self._kept:
            async with self._compiling:
                if form.key not in self._kept:  # nor was it made meanwhile
                    self._keep(form.key, await asyncio.to_thread(self._compile, form))
        return self.matcher(form)

    def matcher(self, form: Form) -> Matcher:
        """Return the matcher of a form, compiled here where it is not kept."""
        if form.key not in self._kept:
            self._keep(form.key, self._compile(form))
        self._kept.move_to_end(form.key)
        return self._kept[form.key]

    def _keep(self, key: str, matcher: Matcher) -> None:
        self._kept[key] = matcher
        while len(self._kept) > 1 and sum(map(len, self._kept)) > _KEPT_TEXT:
            self._kept.popitem(last=False)

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        ends = [int(token) for token in self._engine.manifest.model["eos_token_ids"]]
        text = self._engine.tokenizer.to_str()
        return llguidance.LLTokenizer(text, n_vocab=self._vocabulary, eos_token=ends or None)

    def _compile(self, form: Form) -> Matcher:
        make = llguidance.LLMatcher
        try:
            if form.kind == "json_schema":
                schema = json.dumps(closed(form.source))
                grammar = make.grammar_from_json_schema(schema, overrides=_WHITESPACE)
            elif form.kind == "regex":
                grammar = make.grammar_from_regex(form.source)
            else:
                grammar = make.grammar_from_lark(form.source)
        except ValueError as error:
            raise _refused(form, str(error)) from None
        try:
            vocabulary = self._tokenizer
        except ValueError as error:  # of what llguidance does not read
            raise ApiError(
                400,
                f"no answer of this model can be held to {form.param}: its tokenizer does not say "
                f"which bytes its tokens are ({error})",
                form.param,
            ) from None
        matcher = make(vocabulary, grammar, log_level=0)
        made = Matcher(matcher, self._vocabulary, form, self._beside)
        if not matcher.is_error() and not made.mask()([]).any():
            raise ApiError(400, f"{form.param} allows no answer at all", form.param)
        if matcher.is_error():
            raise _refused(form, matcher.get_error())
        return made


class Matcher:
    """A compiled form, not begun."""

    def __init__(
        self, matcher: llguidance.LLMatcher, vocabulary: int, form: Form, beside: Executor
    ):
        self._matcher, self._vocabulary, self._form = matcher, vocabulary, form
        self._beside = beside

    def mask(self) -> Mask:
        """Return what the sampler asks before each token of one answer.

        It raises ApiError 400 where the form asks for more work than llguidance does.
        """
        refused = partial(_refused, self._form)
        return Mask(self._matcher.deep_copy(), self._vocabulary, refused, self._form, self._beside)


def embedded(schema: Any) -> Any:
    """Return a schema as a grammar's ``%json`` takes it, spelled as one that is a form itself."""
    schema = closed(schema)
    return {**schema, "x-guidance": _WHITESPACE} if isinstance(schema, dict) else schema


def _refused(form: Form, reason: str) -> ApiError:
    reason = " ".join(reason.partition("<state>")[0].split())[:400]
    return ApiError(400, f"{form.param} cannot be held by an answer: {reason}", form.param)
