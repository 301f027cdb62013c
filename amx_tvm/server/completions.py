"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from amx_tvm.runtime.result import TokenLogprobs
from amx_tvm.server.answer import Pieces
from amx_tvm.server.choices import Asked
from amx_tvm.server.errors import ApiError
from amx_tvm.server.news import Piece
from amx_tvm.server.objects import DONE, Envelope, TextEvent, event
from amx_tvm.server.protocol import MAX_ANSWERS, CompletionRequest

_DEFAULT_TOKENS = 16  # OpenAI's, where a completion says no max_tokens


class Completion:
    """One request, checked and ready to run.

    Attributes
    ----------
    answer : Answer
        Its choices.
    """

    def __init__(self, body: CompletionRequest, ids: list[list[int]], asked: Asked):
        if body.best_of not in (None, body.n or 1):
            raise ApiError(
                400, f"best_of is {body.best_of}, expected n ({body.n or 1}) or nothing", "best_of"
            )
        if len(ids) * (body.n or 1) > MAX_ANSWERS:
            raise ApiError(
                400,
                f"prompt has {len(ids)} prompts and n is {body.n or 1}, expected at most "
                f"{MAX_ANSWERS} answers of one request; send several",
                "prompt",
            )
        if body.suffix:
            raise ApiError(400, "suffix is not supported; leave it out", "suffix")
        prompts = asked.prompts
        rooms = [
            prompts.room(p, "prompt", body.max_tokens, "max_tokens", _DEFAULT_TOKENS) for p in ids
        ]
        self._body, self._ids, self._core, self._adapter = body, ids, asked.core, asked.adapter
        self._spelling = prompts.spelling
        self._scores: list[list[TokenLogprobs]] | None = None
        self._envelope = Envelope("text_completion", asked.model, "cmpl")
        self._echoes = [prompts.decode(p) if body.echo else "" for p in ids]
        self._each = body.n or 1
        self._offsets: dict[int, int] = {}
        self._texts: dict[int, TextEvent] = {}  # of choices that have begun
        self.answer = asked.answer(body, ids, rooms if body.max_tokens != 0 else [], body.logprobs)
        self._so_far = self.answer.usage if body.tells_usage_always else None

    async def whole(self) -> dict[str, Any]:
        """Return the response that is not streamed."""
        choices: dict[int, dict[str, Any]] = {}

        def add(pieces: Pieces) -> None:
            for index, piece in pieces:
                made = self._choice(index, piece)
                held = choices.setdefault(index, made)
                if held is not made:
                    held["text"] += made["text"]
                    held["finish_reason"] = made["finish_reason"]
                    for name, values in (made["logprobs"] or {}).items():
                        held["logprobs"][name] += values

        add(await self._prompts())
        async for arrived in self.answer.pieces():
            add(arrived)
        return self._envelope.of([choices[i] for i in sorted(choices)], self.answer.usage)

    async def opening(self) -> bytes:
        """Return what comes before all pieces: of prompts alone, where no tokens are asked for."""
        return b"".join(self.of(index, piece) for index, piece in await self._prompts())

    def of(self, index: int, piece: Piece) -> bytes:
        """Return what a piece of a choice says."""
        if index in self._texts and piece.text and not piece.logprobs and not piece.finish_reason:
            self._offsets[index] += len(piece.text)
            return self._texts[index].of(piece.text)
        choice = self._choice(index, piece)
        if not self._so_far:
            self._texts[index] = TextEvent(partial(self._text_chunk, index))
        if not choice["text"] and not choice["logprobs"] and not piece.finish_reason:
            return b""
        return event(self._envelope.of([choice], self._so_far))

    def closing(self) -> bytes:
        """Return what comes behind the last piece."""
        if not self._body.tells_usage:
            return DONE
        return event(self._envelope.of([], self.answer.usage)) + DONE

    def failed(self, error: ApiError) -> bytes:
        """Return the last event of a stream that fails."""
        return event(error.body)

    async def _prompts(self) -> Pieces:
        """Find the prompts' own log-probabilities; return the pieces of answers without tokens."""
        body = self._body
        if body.echo and body.logprobs is not None:
            top = body.logprobs
            asked = (self._core.score(p, top, self._adapter) for p in self._ids)
            self._scores = await asyncio.gather(*asked)
        if body.max_tokens != 0:
            return []
        ended = Piece(finish_reason="length")
        return [(index, ended) for index in range(len(self._ids) * self._each)]

    def _text_chunk(self, index: int, text: str) -> dict[str, Any]:
        return self._envelope.of([_choice(index, text)])

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the choice's object for a piece; the first one has the prompt, where it is asked
        for.
        """
        text, entries = piece.text, list(piece.logprobs)
        offset = self._offsets.get(index, 0)
        logprobs = None
        if index not in self._offsets:
            which = index // self._each
            text = self._echoes[which] + text
            if self._scores is not None:
                logprobs = self._logprobs(self._scores[which], self._ids[which][0])
            offset = len(self._echoes[which])
        if entries:
            made = self._logprobs(entries, None, offset)
            logprobs = made if logprobs is None else {k: logprobs[k] + made[k] for k in made}
        self._offsets[index] = self._offsets.get(index, 0) + len(text)
        return _choice(index, text, logprobs, piece.finish_reason)

    def _logprobs(
        self, entries: Sequence[TokenLogprobs], first: int | None, offset: int = 0
    ) -> dict[str, Any]:
        """Return OpenAI's lists; ``first`` is a prompt's first token, which nothing predicts."""
        text = self._spelling.text
        found: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        if first is not None:
            found = {
                "tokens": [text(first)],
                "token_logprobs": [None],
                "top_logprobs": [None],
                "text_offset": [0],
            }
            offset = len(text(first))
        for entry in entries:
            spelled = text(entry.token)
            found["tokens"].append(spelled)
            found["token_logprobs"].append(entry.logprob)
            found["top_logprobs"].append({text(token): value for token, value in entry.top})
            found["text_offset"].append(offset)
            offset += len(spelled)
        return found


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
