"""From a request's fields to the engine's requests, one a choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from amx_tvm.errors import GenerationError
from amx_tvm.images import PromptImage
from amx_tvm.runtime.request import Request
from amx_tvm.server.answer import Answer
from amx_tvm.server.core import Core
from amx_tvm.server.errors import ApiError
from amx_tvm.server.grammar import Form, Matcher
from amx_tvm.server.prompts import Prompts
from amx_tvm.server.protocol import Generation

_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "seed",
)


@dataclass(frozen=True)
class Asked:
    """What a request is answered with, whatever its endpoint.

    Attributes
    ----------
    prompts : Prompts
        The engine's tokenizer, chat template and context.
    core : Core
        Where answers run.
    model : str
        The model's name in the response.
    salt : str
        Whose the request is: only prompts of one salt share what was computed.
    matcher : Matcher or None
        The form that its answers are held to.
    images : tuple of PromptImage
        Of its prompt.
    adapter : str or None
        The LoRA adapter that it is answered with.
    """

    prompts: Prompts
    core: Core
    model: str
    salt: str
    matcher: Matcher | None = None
    images: tuple[PromptImage, ...] = ()
    adapter: str | None = None

    def answer(
        self, body: Generation, ids: list[list[int]], rooms: list[int], logprobs: int | None
    ) -> Answer:
        """Return the answer, not started: n choices of the first prompt, n of the second, ...

        Parameters
        ----------
        body : Generation
            The HTTP request.
        ids : list of list of int
            The prompts' token ids.
        rooms : list of int
            Most new tokens for each prompt; without any there are no choices.
        logprobs : int or None
            How many most likely tokens are told beside each chosen one; None tells nothing.

        Raises
        ------
        ApiError
            400 names the option that is wrong.
        """
        made = Answer(self.core, self._choices(body, ids, rooms, logprobs))
        made.usage.prompt_tokens = sum(map(len, ids))
        return made

    def _choices(
        self, body: Generation, ids: list[list[int]], rooms: list[int], logprobs: int | None
    ) -> list[Request]:
        matcher, make, made = self.matcher, self.prompts.engine.request, []
        options = _options(body)
        try:
            for prompt, room in zip(ids, rooms, strict=bool(rooms)):
                first = make(
                    prompt,
                    images=self.images,
                    adapter=self.adapter,
                    max_new_tokens=room,
                    logprobs=logprobs,
                    **options,
                )
                for stream in range(body.n or 1):
                    mask = matcher.mask() if matcher is not None else None
                    made.append(replace(first, stream=stream, salt=self.salt, mask=mask))
        except GenerationError as error:
            raise ApiError(400, str(error)) from None
        return made


def _options(body: Generation) -> dict[str, Any]:
    """Return a request's options as the engine takes them."""
    options: dict[str, Any] = {name: getattr(body, name) for name in _OPTIONS}
    if options["temperature"] is None:
        options["temperature"] = 1.0  # OpenAI's
    if options["top_k"] == -1:
        options["top_k"] = 0
    if options["seed"] is not None:
        options["seed"] &= (1 << 64) - 1  # OpenAI's may be negative
    return options


def form_of(body: Generation) -> Form | None:
    """Return the form that ``regex`` or ``grammar`` asks for; ApiError 400 for both."""
    given = [name for name in ("regex", "grammar") if getattr(body, name) is not None]
    if len(given) > 1:
        raise ApiError(400, "regex and grammar exclude each other; give one of them", "grammar")
    return Form(given[0], getattr(body, given[0]), given[0]) if given else None
