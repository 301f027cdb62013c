"""From a request's text, messages or token ids to checked token ids, and from tokens to text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar, cast

from amx_tvm.errors import ArtifactError, GenerationError
from amx_tvm.images import PromptImage
from amx_tvm.runtime import Engine
from amx_tvm.runtime.chat import ChatTemplates, load_chat_template
from amx_tvm.runtime.pictures import prepared
from amx_tvm.server.errors import ApiError
from amx_tvm.server.images import ImageAccess
from amx_tvm.server.protocol import Message
from amx_tvm.server.spelling import Spelling

NO_MORE = ImageAccess()
_LONG = 1 << 14  # characters from which encoding leaves the event loop to a thread
_TAKEN = frozenset({"self", "messages", "tools", "add_generation_prompt"})
Result = TypeVar("Result")


class Prompts:
    """An engine's tokenizer, chat template and context, as the front asks for them."""

    def __init__(self, engine: Engine, images: ImageAccess = NO_MORE):
        self.engine, self._images = engine, images
        self.context = engine.context_length
        self.vocabulary = int(engine.manifest.model["vocab_size"])
        self._templates: ChatTemplates | ArtifactError
        try:
            self._templates = load_chat_template(engine.path)
        except ArtifactError as error:
            self._templates = error

    async def encode(self, text: str, param: str) -> list[int]:
        """Return the ids of a text, with BOS where the model wants one."""
        found = await self._away(len(text), self.engine.encode, text)
        return self.checked(found, param)

    async def of_completion(
        self, given: str | list[int] | list[str] | list[list[int]]
    ) -> list[list[int]]:
        """Return the ids of a completion's prompts: one, or several."""
        for text in [given] if isinstance(given, str) else given:
            if isinstance(text, str):
                self._check_size(len(text), "prompt")
        if isinstance(given, str):
            return [await self.encode(given, "prompt")]
        if not given:
            raise ApiError(400, "prompt is an empty list, expected at least one prompt", "prompt")
        ids: list[list[int]] = []
        for index, one in enumerate(given):
            if isinstance(one, int):  # the list is one prompt
                return [self.checked(cast("list[int]", given), "prompt")]
            param = f"prompt[{index}]"
            made = await self.encode(one, param) if isinstance(one, str) else one
            ids.append(self.checked(cast("list[int]", made), param))
        return ids

    async def of_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: dict[str, Any] | None = None,
        fits: bool = True,
        param: str = "messages",
    ) -> tuple[list[int], tuple[PromptImage, ...]]:
        """Return the ids of a conversation that goes through the model's chat template.

        Where it has to fit into the context, one that surely does not is not tokenized. Its
        images come with the ids, which have a token for each of their rows.
        """
        if isinstance(self._templates, ArtifactError):
            raise ApiError(400, f"{self._templates}; use /v1/completions", param)
        for name in _TAKEN & (variables or {}).keys():
            raise ApiError(
                400,
                f"chat_template_kwargs holds {name!r}, which it cannot set; leave it out",
                "chat_template_kwargs",
            )
        plain = [_plain(message) for message in messages]
        size = sum(map(_characters, plain))
        if fits:
            self._check_size(size, param)
        size += len(str(tools or ""))
        if any(map(_has_images, plain)):
            size += _LONG  # they take their time
        templates = self._templates

        def made() -> tuple[list[int], tuple[PromptImage, ...]]:
            engine = self.engine
            seen = engine.images
            token = "" if seen is None else str(engine.tokenizer.id_to_token(seen.token))
            images = self._images.take(plain, seen, token, param)
            text = templates.find(tools).render(
                plain, add_generation_prompt, tools, **(variables or {})
            )
            if fits:  # tools and calls are text too
                self._check_size(len(text), param)
            return prepared(seen, text, images, engine.encode, lambda _: token)

        try:
            ids, images = await self._away(size, made)
            return self.checked(ids, param), images
        except GenerationError as error:
            raise ApiError(400, str(error), param) from None

    def checked(self, ids: list[int], param: str) -> list[int]:
        """Return ids that the model can take; ApiError 400 otherwise."""
        if not ids:
            raise ApiError(400, f"{param} is empty, expected at least one token", param)
        if max(ids) >= self.vocabulary:
            raise ApiError(
                400,
                f"{param} holds token {max(ids)}, the vocabulary has {self.vocabulary}",
                param,
            )
        return ids

    def room(
        self, ids: list[int], param: str, wanted: int | None, name: str, default: int | None
    ) -> int:
        """Return how many tokens may follow a prompt.

        Parameters
        ----------
        ids : list of int
            The prompt.
        param : str
            The field that holds the prompt.
        wanted : int or None
            What the request asks for.
        name : str
            The field in which it does.
        default : int or None
            Taken where it asks for nothing; None fills the context.

        Raises
        ------
        ApiError
            400 where prompt and answer exceed the context: nothing is cut.
        """
        left = self.context - len(ids)
        if left < 1 or (wanted is not None and wanted > left):
            asked = f" and {name} asks for {wanted}" if wanted is not None else ""
            raise ApiError(
                400,
                f"this model's context is {self.context} tokens; {param} has {len(ids)}{asked}: "
                "ask for less, or shorten it",
                param if left < 1 else name,
                "context_length_exceeded",
            )
        if wanted is not None:
            return wanted
        return left if default is None else min(default, left)

    def ends_with(self, ids: Sequence[int], mark: str) -> bool:
        """Whether a prompt's text ends with a mark, blanks behind it aside."""
        text = self.engine.tokenizer.decode(list(ids[-8:]), skip_special_tokens=False)
        return bool(text.rstrip().endswith(mark))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return self.engine.decode(ids)

    def _check_size(self, characters: int, param: str) -> None:
        """Turn a text away that no tokenizer makes fit, before one works on it for seconds."""
        if characters < _LONG:
            return
        least = characters // self._longest
        if least > self.context:
            raise ApiError(
                400,
                f"this model's context is {self.context} tokens; {param} has {characters} "
                f"characters, at least {least} tokens: shorten it",
                param,
                "context_length_exceeded",
            )

    @cached_property
    def _longest(self) -> int:
        """Characters of the vocabulary's longest token."""
        return max(map(len, self.engine.tokenizer.get_vocab()))

    @cached_property
    def spelling(self) -> Spelling:
        """How single tokens are spelled."""
        return Spelling(self.engine.tokenizer)

    async def _away(self, size: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run short work here and long work in a thread, so that streams go on meanwhile."""
        if size < _LONG:
            return work(*arguments)
        return await asyncio.to_thread(work, *arguments)


def _characters(message: dict[str, Any]) -> int:
    """Return how long a message's text is."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return len(content)
    return sum(len(part.get("text") or "") for part in content)


def _has_images(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(part["type"] != "text" for part in content)


def _plain(message: Message) -> dict[str, Any]:
    """Return a message as templates take it: developers are the system's voice."""
    found = message.model_dump(exclude_none=True)
    if found["role"] == "developer":
        found["role"] = "system"
    return found
