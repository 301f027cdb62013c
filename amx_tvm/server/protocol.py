"""What requests may hold. A field that is wrong, or unknown, is named with what was expected.

Names and ranges are those of OpenAI's API; ``top_k``, ``min_p``, ``repetition_penalty``,
``min_tokens``, ``ignore_eos`` and ``stop_token_ids`` are the extensions that vLLM and llama.cpp
have too. Fields of OpenAI's that say nothing about the answer here (``user``, ``metadata``, ...)
are taken and have no effect. ``regex`` and ``grammar`` (Lark) hold an answer to a form.
"""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails, from_json

from amx_tvm.server.errors import ApiError

MAX_CHOICES = 128
MAX_ANSWERS = 2048  # choices of all prompts of one request
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_MESSAGES = 8192
MAX_ENTRIES = 1024  # of other lists: parts of a message, tools, tokens that stop
MAX_TOKENS = 1 << 20  # of a prompt that is token ids
MAX_CHARACTERS = 1 << 22  # of a text that is only tokenized

TokenId = Annotated[int, Field(ge=0)]
# Lists end at the first entry that is wrong or too much: a body of megabytes holds streams up for
# as long as it is checked, and each error takes longer than an entry.
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]
Entries = Field(max_length=MAX_ENTRIES, fail_fast=True)
Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class Strict(BaseModel):
    """A JSON object without unknown fields; numbers are numbers, and finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """``stream_options``; vLLM's clients ask for usage with every chunk."""

    include_usage: bool = False
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class Generation(Strict):
    """The fields that completions and chat share."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, Field(max_length=1 << 16)
    ] = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Entries] | None = None
    ignore_eos: bool | None = False
    seed: int | None = None
    regex: str | None = None
    grammar: str | None = None
    user: str | None = None

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def tells_usage_always(self) -> bool:
        """Whether its other chunks have the usage so far, too."""
        options = self.stream_options
        return self.tells_usage and options is not None and bool(options.continuous_usage_stats)


class CompletionRequest(Generation):
    """The body of /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=MAX_ANSWERS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(max_length=MAX_ANSWERS, fail_fast=True)]
    )
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None


class EmbeddingRequest(Strict):
    """The body of /v1/embeddings; ``prompt_name`` and ``truncate`` are ours."""

    model: str | None = None
    input: (
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=MAX_ANSWERS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(max_length=MAX_ANSWERS, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    prompt_name: str | None = None
    truncate: bool | None = False
    user: str | None = None


class Text(Strict):
    """A part of a message's content that is text."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where an image is; ``detail`` has no effect."""

    url: str
    detail: str | None = None


class ImagePart(Strict):
    """A part of a message's content that is an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _kind(part: Any) -> str:
    """Name the class of a part, so that an error is about its own fields."""
    given = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return "ImagePart" if given == "image_url" else "Text"


Part = Annotated[
    Annotated[Text, Tag("Text")] | Annotated[ImagePart, Tag("ImagePart")], Discriminator(_kind)
]


class Function(Strict):
    """The call that a model made, in a message."""

    name: str
    arguments: str


class ToolCall(Strict):
    """One entry of a message's ``tool_calls``."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None


class Message(BaseModel):
    """One message of a chat; a template may read fields that are not listed here."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Entries] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Entries] | None = None
    tool_call_id: str | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Tools = Annotated[list[dict[str, Any]], Entries]
Metadata = Annotated[dict[str, str], Field(max_length=MAX_STOPS)]  # OpenAI's bound


class Schema(Strict):
    """``response_format.json_schema``."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class ChatRequest(Generation):
    """The body of /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class TokenizeRequest(Strict):
    """The body of /tokenize: a text, or a chat through the model's template."""

    model: str | None = None
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = None
    messages: Messages | None = None
    add_generation_prompt: bool = True
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Strict):
    """The body of /detokenize."""

    model: str | None = None
    tokens: TokenIds


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], body: bytes) -> Body:
    """Return a request's body as its type; ApiError 400 names the first field that is wrong.

    JSON is read before it is checked: pydantic's errors hold what they are about, and would make it
    anew for each.
    """
    try:
        return kind.model_validate(from_json(body, allow_inf_nan=False))
    except ValidationError as error:
        raise _first_error(error) from None
    except ValueError as error:
        raise ApiError(400, f"the request's body is no JSON: {error}") from None


def _first_error(error: ValidationError) -> ApiError:
    """Turn pydantic's report into one sentence about one field.

    A union reports each of its members; the longest path belongs to the member that came nearest.
    An object of another type has other fields: the type comes before them.
    """
    found = error.errors(include_url=False, include_context=False, include_input=True)
    first = found[0]["loc"][:1]
    worst = max((e for e in found if e["loc"][:1] == first), key=_nearness)
    path = _path(worst["loc"])
    if worst["type"] == "extra_forbidden":
        return ApiError(400, f"{path} is no field of this request; leave it out", path)
    if worst["type"] == "missing":
        return ApiError(400, f"{path} is missing, it is required", path)
    given = _SHORT.repr(worst["input"])
    given = given if len(given) <= 80 else given[:77] + "..."
    reasons = dict.fromkeys(e["msg"] for e in found if e["loc"][:1] == first)
    expected = "; ".join(list(reasons)[:4])
    return ApiError(400, f"{path or 'the body'} is {given}: {expected}", path or None)


_SHORT = reprlib.Repr()  # of what may be megabytes
_SHORT.maxstring = _SHORT.maxother = 76


def _nearness(error: ErrorDetails) -> tuple[int, bool, int]:
    path = _path(error["loc"])
    return path.count(".") + path.count("["), error["type"] != "extra_forbidden", len(path)


def _path(place: tuple[int | str, ...]) -> str:
    """Spell a place in JSON; names of types that pydantic puts between are left out."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and not part[0].isupper() and part not in ("str", "int", "list"):
            text += f".{part}" if text else part
    return text
