"""From a request's fields to the engine's requests, one a choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from amx_tvm.errors import GenerationError
from amx_tvm.runtime import Engine
from amx_tvm.runtime.request import Request
from amx_tvm.server.errors import ApiError
from amx_tvm.server.grammar import Form, Matcher
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


def choices_of(
    engine: Engine,
    body: Generation,
    prompts: list[list[int]],
    rooms: list[int],
    logprobs: int | None,
    salt: str,
    matcher: Matcher | None = None,
) -> list[Request]:
    """Return a request for each choice: n of the first prompt, n of the second, ...

    Parameters
    ----------
    engine : Engine
        What they are for.
    body : Generation
        The HTTP request.
    prompts : list of list of int
        Token ids.
    rooms : list of int
        Most new tokens for each prompt.
    logprobs : int or None
        How many most likely tokens are told beside each chosen one; None tells nothing.
    salt : str
        Whose it is: only prompts of one salt share what was computed.
    matcher : Matcher, optional
        The form that answers are held to.

    Raises
    ------
    ApiError
        400 names the option that is wrong.
    """
    options: dict[str, Any] = {name: getattr(body, name) for name in _OPTIONS}
    if options["temperature"] is None:
        options["temperature"] = 1.0  # OpenAI's
    if options["top_k"] == -1:
        options["top_k"] = 0
    if options["seed"] is not None:
        options["seed"] &= (1 << 64) - 1  # OpenAI's may be negative
    try:
        return [
            replace(
                engine.request(prompt, stream, max_new_tokens=room, logprobs=logprobs, **options),
                salt=salt,
                mask=matcher.mask() if matcher is not None else None,
            )
            for prompt, room in zip(prompts, rooms, strict=True)
            for stream in range(body.n or 1)
        ]
    except GenerationError as error:
        raise ApiError(400, str(error)) from None


def form_of(body: Generation) -> Form | None:
    """Return the form that ``regex`` or ``grammar`` asks for; ApiError 400 for both."""
    given = [name for name in ("regex", "grammar") if getattr(body, name) is not None]
    if len(given) > 1:
        raise ApiError(400, "regex and grammar exclude each other; give one of them", "grammar")
    return Form(given[0], getattr(body, given[0]), given[0]) if given else None
