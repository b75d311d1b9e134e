"""The files beside a tokenizer: `tokenizer_config.json` and the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhesa.atomic_io import read_json, write_file
from mhesa.errors import InputError
from mhesa.file_names import CHAT_TEMPLATE, TOKENIZER_CONFIG

if TYPE_CHECKING:
    from mhesa.tokenizers.base import Tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """The values in a folder's `tokenizer_config.json`; none if there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / TOKENIZER_CONFIG
    if not path.exists():
        return {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged: it holds no settings")
    return values


def read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template of a tokenizer's folder, or that in its `tokenizer_config.json`; `None` if none."""
    file = folder / CHAT_TEMPLATE
    template = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    return template if isinstance(template, str) else None


def token_text(token: Any) -> str | None:
    """The text of a special token, which files hold as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def write_config(folder: Path, kind: str, tokenizer: Tokenizer, **more: Any) -> None:
    """Write what transformers' `AutoTokenizer` asks for.

    Args:
        folder: folder to write to; it is made if it is not there.
        kind: the name of transformers' class for such a tokenizer.
        tokenizer: has the end-of-text token, which begins texts too, the padding token and the chat template.
        more: further values of `tokenizer_config.json`.
    """
    values = {
        **more,
        **dict.fromkeys(("bos_token", "eos_token"), tokenizer.eos_token),
        "pad_token": tokenizer.pad_token,
        "clean_up_tokenization_spaces": False,
        # Generation continues all texts of a batch at their ends, so padding goes before them.
        "padding_side": "left",
        "tokenizer_class": kind,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with write_file(folder / TOKENIZER_CONFIG) as file:
        file.write(json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n")
    if tokenizer.chat_template is not None:
        with write_file(folder / CHAT_TEMPLATE) as file:
            file.write(tokenizer.chat_template.encode())
