"""Chat templates: a conversation becomes the text that the model was trained on.

A template is a Jinja program that the model ships. It runs in a sandbox in a process of its own,
under limits (``amx_tvm/templating``), with the names that Hugging Face's ``apply_chat_template``
gives it. Messages in OpenAI's forms are adapted to what the template takes
(``amx_tvm/runtime/messages.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from amx_tvm.errors import ArtifactError, GenerationError
from amx_tvm.runtime.messages import Expectation, Message, adapted, checked_tools
from amx_tvm.strict_json import read_json
from amx_tvm.templating import process

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
    GenerationError
        When it cannot be compiled within the limits.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str | None] | None = None):
        self.source = template
        # Jinja has no null text: a missing token is the empty string.
        self._tokens = {key: value or "" for key, value in (special_tokens or {}).items()}
        try:
            process.shared.render(template, None)
        except process.InvalidTemplate as error:
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
            For malformed messages or tools, or when the template refuses the conversation or goes
            beyond a limit.
        """
        return self._render(
            adapted(messages, self._expects),
            tools=checked_tools(tools),
            add_generation_prompt=add_generation_prompt,
            **variables,
        )

    def _render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        names = {"tools": None, "documents": None, **self._tokens, **variables}
        return process.shared.render(self.source, {**names, "messages": messages})

    @cached_property
    def _expects(self) -> Expectation:
        """What the template takes, found out by short conversations."""

        def render(
            messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
        ) -> str | None:
            try:
                return self._render(messages, tools=tools, add_generation_prompt=False)
            except process.TemplateLimitError:
                raise  # each further conversation would wait for the limit again
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
        config = read_json(path, ArtifactError)
    except FileNotFoundError:
        raise ArtifactError(f"{directory} has no {CONFIG_FILE}, so it cannot chat") from None
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
    tokens = {key: config.get(key) for key in SPECIAL_TOKENS}
    for key, token in tokens.items():
        if token is not None and not isinstance(token, str):
            raise ArtifactError(f"{path}: {key} is no text; compile the model again")
    return ChatTemplates(templates, tokens)
