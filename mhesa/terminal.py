"""Text of models, files and users on a terminal: as it is, but for the characters that control it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# ESC, BEL, shift-out and their like; no line ends and tabs.
CONTROLS = frozenset({*range(0x20), *range(0x7F, 0xA0)} - set(b"\t\n\r"))
_ESCAPES = {code: f"\\x{code:02x}" for code in CONTROLS}


def escape_controls(text: str) -> str:
    """The text with control characters as escapes.

    >>> escape_controls("a\\tb\\x1b[31m")
    'a\\tb\\\\x1b[31m'
    """
    return text.translate(_ESCAPES)


def say(console: Console, text: str, **style: Any) -> None:
    """Print text as it is: rich would take brackets for markup and `:key:` for an emoji, and break lines."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True, **style)
