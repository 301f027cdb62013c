"""Chat templates: a conversation becomes the text that the model was trained on.

A template is a Jinja program that the model ships, so it runs in Jinja's sandbox, with the names
and settings that Hugging Face's ``apply_chat_template`` gives it: ``raise_exception``,
``strftime_now``, a ``tojson`` that does not escape HTML, ``{% generation %}`` blocks, loop
controls, and trimmed blocks. Messages in OpenAI's forms are adapted to what the template takes
(``amx_tvm/runtime/messages.py``); where a template prints a list, an object or null as it is,
transformers shows Python's spelling, and here it is JSON and nothing. Needs jinja2 only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from amx_tvm.errors import ArtifactError, GenerationError
from amx_tvm.runtime.messages import Expectation, Message, adapted, checked_tools

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
DEFAULT, WITH_TOOLS = "default", "tool_use"


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
            Each with "role" ("system", "user", "assistant", "tool", ...) and "content", a text or
            a list of parts; in all of the forms that OpenAI's clients send.
        add_generation_prompt : bool
            End with the header of the assistant's answer.
        tools : sequence of mappings, optional
            JSON schemas of functions, for templates that know them.
        **variables
            More names for the template, such as ``enable_thinking``.

        Raises
        ------
        GenerationError
            For malformed messages or tools, or when the template refuses the conversation.
        """
        return self._render(
            adapted(messages, self._expects),
            tools=checked_tools(tools),
            add_generation_prompt=add_generation_prompt,
            **variables,
        )

    def _render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        from jinja2 import TemplateError

        names = {"tools": None, "documents": None, **self._tokens, **variables}
        try:
            return self._template.render(messages=messages, **names)
        except (TemplateError, TypeError, KeyError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise GenerationError(
                f"the model's chat template refuses this conversation: {reason}"
            ) from None

    @cached_property
    def _expects(self) -> Expectation:
        """What the template takes, found out by short conversations."""

        def render(
            messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
        ) -> str | None:
            try:
                return self._render(messages, tools=tools, add_generation_prompt=False)
            except GenerationError:
                return None

        return Expectation.of(render)


class ChatTemplates:
    """The chat templates of a model, of which one fits a request.

    Parameters
    ----------
    templates : mapping of str to str
        Jinja sources by name.
    special_tokens : dict, optional
        See :class:`ChatTemplate`.

    Raises
    ------
    ArtifactError
        When a template is no valid Jinja.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str | None] | None = None,
    ):
        self._templates = {
            name: ChatTemplate(source, special_tokens) for name, source in templates.items()
        }

    def find(self, tools: Any = None, name: str | None = None) -> ChatTemplate:
        """Return the template for a request: by name, else "tool_use" with tools, else the default.

        Raises
        ------
        GenerationError
            When the model has no template of that name, or several and none is the default.
        """
        wanted = [name] if name else [WITH_TOOLS, DEFAULT] if tools else [DEFAULT]
        found = [self._templates[key] for key in wanted if key in self._templates]
        if not found and not name and len(self._templates) == 1:
            found = list(self._templates.values())
        if not found:
            raise GenerationError(
                f"the model has no chat template {name or DEFAULT!r}; it has "
                + ", ".join(map(repr, sorted(self._templates)))
                + ", one of which is to be named with template="
            )
        return found[0]

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """Return the prompt of a conversation; see :meth:`ChatTemplate.render`.

        ``template`` is the name of one of several templates.
        """
        chosen = self.find(tools, template)
        return chosen.render(messages, add_generation_prompt, tools, **variables)


def load_chat_template(directory: str | Path) -> ChatTemplates:
    """Return the chat templates of an artifact.

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
    templates = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(templates, list):
        templates = {t.get("name"): t.get("template") for t in templates if isinstance(t, dict)}
    elif isinstance(templates, str):
        templates = {DEFAULT: templates}
    if not isinstance(templates, dict) or not templates:
        raise ArtifactError(
            f"the model in {directory} ships no chat template: it is a base model; continue a text "
            "with generate instead"
        )
    if not all(isinstance(item, str) for pair in templates.items() for item in pair):
        raise ArtifactError(f"{path} has a chat template that is no text; compile the model again")
    return ChatTemplates(templates, {key: config.get(key) for key in SPECIAL_TOKENS})


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

    def printed(value: Any) -> Any:
        if isinstance(value, dict | list | tuple):
            return tojson(value)
        return "" if value is None else value

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        finalize=printed,
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
