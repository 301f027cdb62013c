"""What /v1/responses takes, and the chat that it means.

Nothing is kept between two requests: a conversation is sent whole, as a list of items.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from amx_tvm.server.errors import ApiError
from amx_tvm.server.grammar import Form
from amx_tvm.server.protocol import (
    MAX_LOGPROBS,
    MAX_MESSAGES,
    Entries,
    Function,
    ImagePart,
    Message,
    Metadata,
    Strict,
    Text,
    ToolCall,
)

LOGPROBS = "message.output_text.logprobs"


class TextPart(Strict):
    """Text of a message, of a tool's output or of a thinking part."""

    type: Literal["input_text", "output_text", "reasoning_text", "summary_text", "text"]
    text: str
    annotations: Annotated[list[Any], Entries] | None = None
    logprobs: list[Any] | None = None


Content = str | Annotated[list[TextPart], Entries]


class Item(Strict):
    """The fields of every item."""

    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(Item):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: str | None = None


class CallItem(Item):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(Item):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    name: str | None = None


class ReasoningItem(Item):
    """The thinking part before a message or a call."""

    type: Literal["reasoning"]
    summary: Annotated[list[TextPart], Entries] = Field(default_factory=list)
    content: Annotated[list[TextPart], Entries] | None = None
    encrypted_content: str | None = None


_TAGS = {
    "message": "Message",
    "function_call": "Call",
    "function_call_output": "Output",
    "reasoning": "Reasoning",
}


def _tag(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return _TAGS.get(kind) if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("Message")]
    | Annotated[CallItem, Tag("Call")]
    | Annotated[CallOutputItem, Tag("Output")]
    | Annotated[ReasoningItem, Tag("Reasoning")],
    Discriminator(
        _tag,
        custom_error_type="item_type",
        custom_error_message=f"expected an item whose type is {', '.join(_TAGS)}",
    ),
]


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Strict):
    """``tool_choice`` of one function."""

    type: Literal["function"]
    name: str


class TextFormat(Strict):
    """``text.format``."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    """``text``."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Strict):
    """``reasoning``."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


def _refuse(given: Any) -> None:
    if given is not None:
        raise PydanticCustomError(
            "kept", "nothing is kept between requests here; send the whole conversation as input"
        )


Kept = Annotated[None, BeforeValidator(_refuse)]


class ResponseStreamOptions(Strict):
    """``stream_options``."""

    include_obfuscation: bool | None = None


class ResponseRequest(Strict):
    """The body of /v1/responses."""

    model: str | None = None
    input: (
        str
        | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    )
    instructions: str | None = None
    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        None
    )
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Annotated[list[FunctionTool], Entries] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: Kept = None
    conversation: Kept = None
    prompt: Kept = None
    background: Literal[False] | None = None
    store: bool | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    metadata: Metadata | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    user: str | None = None

    @property
    def listened_tools(self) -> list[dict[str, Any]] | None:
        """The tools as a chat's request has them; None where none may be called."""
        if not self.tools:
            return None
        found = []
        for tool in self.tools:
            function = tool.model_dump(exclude={"type"}, exclude_none=True)
            found.append({"type": "function", "function": function})
        return found

    @property
    def chat_tool_choice(self) -> str | dict[str, Any] | None:
        """``tool_choice`` as a chat's request has it."""
        if isinstance(self.tool_choice, NamedFunction):
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return self.tool_choice

    @property
    def logprobs(self) -> int | None:
        """How many most likely tokens are told beside each; None where nothing is told."""
        asked = LOGPROBS in (self.include or ()) or self.top_logprobs is not None
        return (self.top_logprobs or 0) if asked else None

    def text_form(self) -> Form | None:
        """Return the form that ``text.format`` asks for; ApiError 400 where it lacks a schema."""
        wanted = self.text.format if self.text is not None else None
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return Form("json_schema", {"type": "object"}, "text.format")
        if wanted.schema_ is None:
            raise ApiError(400, "text.format needs schema beside its type", "text.format")
        return Form("json_schema", wanted.schema_, "text.format")

    def messages(self) -> list[Message]:
        """Return the conversation, with the instructions first."""
        items = self.input
        if isinstance(items, str):
            items = [MessageItem(role="user", content=items)]
        made = []
        if self.instructions is not None:
            made.append(Message(role="system", content=self.instructions))
        thought = ""
        for item in items:
            if isinstance(item, ReasoningItem):
                thought = _joined(item.content or [])
            elif isinstance(item, CallOutputItem):
                content = _joined(item.output)
                made.append(Message(role="tool", content=content, tool_call_id=item.call_id))
            elif isinstance(item, MessageItem):
                made.append(Message(role=item.role, content=_content(item.content)))
                if item.role == "assistant":
                    _add_thought(made[-1], thought)
                thought = ""
            else:
                function = Function(name=item.name, arguments=item.arguments)
                _add_call(made, ToolCall(id=item.call_id, function=function), thought)
                thought = ""
        return made


def _add_call(messages: list[Message], call: ToolCall, thought: str) -> None:
    """Add a call to the assistant's last message, or as one of its own."""
    if not messages or messages[-1].role != "assistant":
        messages.append(Message(role="assistant"))
        _add_thought(messages[-1], thought)
    messages[-1].tool_calls = [*(messages[-1].tool_calls or []), call]


def _add_thought(message: Message, thought: str) -> None:
    """Give a message the field from which templates read its thinking part."""
    if thought:
        message.reasoning_content = thought  # type: ignore[attr-defined]


def _content(content: Content) -> str | list[Text | ImagePart]:
    if isinstance(content, str):
        return content
    return [Text(type="text", text=part.text) for part in content]


def _joined(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
