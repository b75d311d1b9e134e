"""The tokenizer in a folder, as transformers wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mhesa.errors import InputError
from mhesa.tokenizers.bytes import END_OF_TEXT, END_OF_TEXT_ID, Bytes
from mhesa.tokenizers.vocabulary import TextTokenizer

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
BYTE_TOKENIZER = "ByteTokenizer"
# What a byte tokenizer without tokens of its own is saved as. Any other is transformers' to read.
PLAIN = {
    "tokenizer_class": BYTE_TOKENIZER,
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    "added_tokens_decoder": {
        str(END_OF_TEXT_ID): {
            "content": END_OF_TEXT,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
    },
}
# What means nothing to bytes, and what may be beside it that does.
OF_TEXT_ALONE = {"backend", "clean_up_tokenization_spaces", "errors", "model_max_length", "padding_side"}
FURTHER_FILES = (CHAT_TEMPLATE, "additional_chat_templates", "added_tokens.json", "special_tokens_map.json")
# What end of text is called where no tokenizer_config.json says so.
ENDS_OF_TEXT = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")


def open_tokenizer(path: str | Path) -> Bytes | TextTokenizer:
    """The tokenizer of a folder, or of a `tokenizer.json`. Reads JSON only, and no code.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = Path(path)
    file = path / TOKENIZER if path.is_dir() else path
    if path.is_dir() and not file.exists() and (path / TOKENIZER_CONFIG).exists():
        return _byte_tokenizer(path)
    if not file.is_file():
        raise InputError(f"there is no tokenizer at {path}; give a folder with {TOKENIZER}, or such a file")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise InputError(f"{file} is not a tokenizer: {error}") from error
    return TextTokenizer(tokenizer, _end_of_text(file, tokenizer), _chat_template(file.parent))


def _byte_tokenizer(folder: Path) -> Bytes:
    values = _read_config(folder)
    name = values.get("tokenizer_class")
    if name != BYTE_TOKENIZER:
        raise InputError(f"{folder} has a {name} without a {TOKENIZER}; save it as a fast tokenizer first")
    told = {key: value for key, value in values.items() if key not in OF_TEXT_ALONE}
    if told == PLAIN and not any((folder / file).exists() for file in FURTHER_FILES):
        return Bytes()
    from mhesa.hf.tokenization import ByteTokenizer

    return ByteTokenizer.from_pretrained(folder, local_files_only=True)


def _end_of_text(file: Path, tokenizer: Tokenizer) -> str:
    token = _read_config(file.parent).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str):
        return token
    # A vocabulary may have learnt such a name from its text, and then it means nothing.
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    return next((name for name in ENDS_OF_TEXT if name in special), END_OF_TEXT)


def _chat_template(folder: Path) -> str | None:
    file = folder / CHAT_TEMPLATE
    template = file.read_text("utf-8") if file.is_file() else _read_config(folder).get("chat_template")
    return template if isinstance(template, str) else None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is broken: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is broken: it holds no settings")
    return values
