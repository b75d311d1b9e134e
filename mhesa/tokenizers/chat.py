"""Chat templates: a conversation as text, by a Jinja template as transformers takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, str]]


def render_chat(template: str, messages: Messages, *, add_generation_prompt: bool, eos_token: str) -> str:
    r"""The text of a conversation.

    The template runs in Jinja's sandbox: it comes from a model's folder and is not trusted.

    Args:
        template: a Jinja template, which sees the other arguments as variables.
        messages: a `role` and a `content` each.
        add_generation_prompt: end with the words that begin an answer.
        eos_token: the token that begins and ends texts; templates see it as `bos_token`, `eos_token` and
            `pad_token`.

    Raises:
        jinja2.TemplateError: the template is wrong, or refuses the conversation.

    >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    >>> render_chat(template, [{"role": "user", "content": "Hi"}], add_generation_prompt=False, eos_token="")
    'user: Hi\n'
    """
    return _compile(template).render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        tools=None,
        documents=None,
        bos_token=eos_token,
        eos_token=eos_token,
        pad_token=eos_token,
    )


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


class _GenerationBlocks(Extension):
    """`{% generation %}` marks what an assistant says, for training on that alone; it changes no text."""

    tags = {"generation"}  # noqa: RUF012 Jinja's own is no ClassVar

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter escapes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
