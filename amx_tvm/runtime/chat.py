"""Chat templates: a conversation becomes the text that the model was trained on.

A template is a Jinja program that the model ships, so it runs in Jinja's sandbox, with the names
and settings that Hugging Face's ``apply_chat_template`` gives it: ``raise_exception``,
``strftime_now``, a ``tojson`` that does not escape HTML, ``{% generation %}`` blocks, loop
controls, and trimmed blocks. Needs jinja2 only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from amx_tvm.errors import ArtifactError, GenerationError

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled chat template.

    Parameters
    ----------
    template : str
        Jinja source.
    special_tokens : dict, optional
        Texts of "bos_token" and the like, which templates write themselves.

    Raises
    ------
    ArtifactError
        When the template is no valid Jinja.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str | None] | None = None):
        from jinja2 import TemplateSyntaxError

        self.source = template
        # Jinja has no null text: a missing token is the empty string.
        self._tokens = {key: value or "" for key, value in (special_tokens or {}).items()}
        try:
            self._template = _environment().from_string(template)
        except TemplateSyntaxError as error:
            raise ArtifactError(f"the chat template is no valid Jinja: {error}") from None

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the prompt of a conversation.

        Parameters
        ----------
        messages : sequence of mappings
            Each with "role" ("system", "user", "assistant", ...) and "content".
        add_generation_prompt : bool
            End with the header of the assistant's answer.
        tools : sequence of mappings, optional
            JSON schemas of functions, for templates that know them.
        **variables
            More names for the template, such as ``enable_thinking``.

        Raises
        ------
        GenerationError
            For malformed messages, or when the template refuses the conversation.
        """
        from jinja2 import TemplateError

        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise GenerationError(
                    f"message {index} of the chat is {message!r}; expected a mapping with 'role' "
                    "and 'content'"
                )
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._tokens, **variables},
            )
        except (TemplateError, TypeError, KeyError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise GenerationError(
                f"the model's chat template refuses this conversation: {reason}"
            ) from None


def load_chat_template(directory: str | Path) -> ChatTemplate:
    """Return the chat template of an artifact.

    Raises
    ------
    ArtifactError
        When tokenizer_config.json is missing, damaged, or has no template.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{directory} has no {CONFIG_FILE}, so it cannot chat") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {error}") from None
    template = config.get("chat_template") if isinstance(config, dict) else None
    if not isinstance(template, str):
        raise ArtifactError(
            f"the model in {directory} ships no chat template: it is a base model; continue a text "
            "with generate instead"
        )
    return ChatTemplate(template, {key: config.get(key) for key in SPECIAL_TOKENS})


@cache
def _environment() -> Any:
    """Return the sandboxed environment; jinja2 is imported only when somebody chats."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's words for training; here it is its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(style: str) -> str:
        return datetime.now().strftime(style)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
