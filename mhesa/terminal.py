"""Text of a model or a file on a terminal: without the characters that control it."""

from __future__ import annotations

# ESC, BEL, shift-out and their like; no line ends and tabs.
CONTROLS = frozenset({*range(0x20), *range(0x7F, 0xA0)} - set(b"\t\n\r"))
_ESCAPES = {code: f"\\x{code:02x}" for code in CONTROLS}


def escape_controls(text: str) -> str:
    """The text with control characters as escapes.

    >>> escape_controls("a\\tb\\x1b[31m")
    'a\\tb\\\\x1b[31m'
    """
    return text.translate(_ESCAPES)
