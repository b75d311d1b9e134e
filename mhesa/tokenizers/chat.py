"""Chat templates: a conversation as text, by a Jinja template as transformers takes them.

Only the template makes special tokens, whatever the messages say. In its own text each special token is
replaced by a mark before it runs, and only marks become special tokens afterwards. A message cannot hold a
mark: it begins with a code point that Unicode keeps for such uses, which messages may not have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mhesa.errors import InputError

if TYPE_CHECKING:
    from mhesa.tokenizers.base import Tokenizer

Messages = Sequence[Mapping[str, str]]
Role = Literal["system", "developer", "user", "assistant"]
# The beginning and the end of a mark, and the end of a part of one.
START, END, PART = "\ufdd0", "\ufdd1", "\ufdd2"


def mark(token: int) -> str:
    """What stands for a special token in the text of a conversation."""
    return f"{START}{token}{END}"


def mark_special_tokens(text: str, special_tokens: Mapping[int, str]) -> str:
    """Replace the texts of special tokens by their marks.

    Raises:
        InputError: the text holds a code point of marks.
    """
    _check(text)
    return _Marks(special_tokens).replace(text)


def render_chat(tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool) -> str:
    """The text of a conversation, in which a mark stands for each special token of the template.

    The template runs in Jinja's sandbox: it comes from a model's folder and is not trusted. It sees the
    end-of-text token as `bos_token` and as `eos_token`.

    Args:
        tokenizer: has the template and the special tokens.
        messages, add_generation_prompt: see `Tokenizer.apply_chat_template`; also for what it raises.

    >>> from mhesa.tokenizers import Bytes
    >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
    >>> messages = [{"role": "user", "content": "What is <|endoftext|>?"}]
    >>> text = render_chat(Bytes(chat_template=template), messages, add_generation_prompt=False)
    >>> text == "user: What is <|endoftext|>?" + mark(256)
    True
    """
    _check(messages)
    special, end = tokenizer.special_tokens(), mark(tokenizer.eos_token_id)
    text = _compile(tokenizer.chat_template, tuple(special.items())).render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        tools=None,
        documents=None,
        bos_token=end,
        eos_token=end,
        pad_token=mark(tokenizer.pad_token_id),
    )
    return _Marks(special).join_parts(text)


def _check(value: Any) -> None:
    """Raise `InputError` if one of the texts in a value of JSON holds a code point of marks."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            _check(one)
    for code in (START, END, PART):
        if isinstance(value, str) and code in value:
            raise InputError(f"a text must not hold U+{ord(code):04X}, which is no character")


class _Marks:
    """Replaces special tokens in a template by marks.

    Args:
        special_tokens: the texts of the special tokens by their ids.
    """

    def __init__(self, special_tokens: Mapping[int, str]) -> None:
        self.ids = {text: token for token, text in special_tokens.items()}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))

    def replace(self, text: str) -> str:
        """Replace whole special tokens."""
        return self.pattern.sub(lambda match: mark(self.ids[match[0]]), text) if self.ids else text

    def replace_literal(self, text: str) -> str:
        """Replace special tokens in a string of a template.

        Some templates put a role between two strings to make a special token, `'<|' + message.role + '|>'`:
        the parts get a code of their own, for `join_parts`.
        """
        text = self.replace(text)
        for before, _, after, _ in self._made_of_roles():
            if text.endswith(before):
                text = text[: -len(before)] + PART + before
            if text.startswith(after):
                text = after + PART + text[len(after) :]
        return text

    def join_parts(self, text: str) -> str:
        """Replace the special tokens that were made of a role between two parts."""
        if PART in text:
            for before, role, after, token in self._made_of_roles():
                text = text.replace(PART + before + role + after + PART, mark(token))
        return text.replace(PART, "")

    def _made_of_roles(self) -> Iterator[tuple[str, str, str, int]]:
        for text, token in self.ids.items():
            for role in get_args(Role):
                before, found, after = text.partition(role)
                if found and before and after:
                    yield before, role, after, token


@lru_cache(maxsize=8)
def _compile(template: str, special_tokens: tuple[tuple[int, str], ...]) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    tree, marks = environment.parse(template), _Marks(dict(special_tokens))
    for data in tree.find_all(nodes.TemplateData):
        data.data = marks.replace_literal(data.data)
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            constant.value = marks.replace_literal(constant.value)
    return environment.from_string(tree)


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
