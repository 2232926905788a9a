"""A checkpoint's own chat template: a conversation as text, and where in it each message lies.

The template is the one that transformers' ``apply_chat_template`` renders, with the same names in its reach. It comes
with a download, so it runs in Jinja's sandbox and sees nothing but texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torchtune.data import Message

# torchtune's name for a tool's answer is older than the one chat templates agreed on.
_ROLES = {"ipython": "tool"}


@dataclass(frozen=True)
class Span:
    """A stretch of the rendered conversation, from the end of the span before it.

    Args:
        end: the character after its last one.
        masked: whether it is left out of the loss.
    """

    end: int
    masked: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the variables that it may use.

    Args:
        source: the template.
        variables: ``bos_token`` and the like.
    """

    source: str
    variables: dict[str, str]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as one text, ending where the assistant's answer begins if ``add_generation_prompt``.

        Raises:
            ValueError: the template refuses this conversation, or a message has content other than text.
        """
        plain = [{"role": _ROLES.get(m.role, m.role), "content": _text_of(m)} for m in messages]
        template = _compile(self.source)
        try:
            return template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    def spans(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The conversation as one text, and in it the span of each message.

        A message ends where the rendering of the conversation up to it ends. Where a template refuses such a
        beginning (a system message alone), the message shares the next one's span, masked if either is.

        Raises:
            ValueError: as :meth:`render`, or the template renders a beginning of the conversation differently.
        """
        text = self.render(messages)
        spans = []
        is_shared_masked = False
        for count, message in enumerate(messages, start=1):
            masked = message.masked or is_shared_masked
            end = len(text) if count == len(messages) else self._end_of(messages[:count], text)
            is_shared_masked = masked and end is None
            if end is not None:
                spans.append(Span(end, masked))
        return text, spans

    def _end_of(self, beginning: Sequence[Message], text: str) -> int | None:
        try:
            rendered = self.render(beginning)
        except ValueError:
            return None
        if not text.startswith(rendered):
            raise ValueError(
                f"the chat template renders the first {len(beginning)} messages differently when others follow, so "
                "which tokens are whose is unknown. Train on one exchange at a time, or name a template that leaves "
                "earlier messages as they are (`chat_template`)."
            )
        return len(rendered)


def _text_of(message: Message) -> str:
    if message.contains_media:
        raise ValueError("a message has content other than text, which this tokenizer does not take")
    return str(message.text_content)


class _Generation(Extension):
    """``{% generation %}``, with which some templates mark the assistant's words: here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares an instance variable)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """Compile a template as transformers does; sandboxed, for it comes with a download."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(source)


def _tojson(value: object, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML's characters
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
