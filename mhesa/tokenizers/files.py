"""Opening the tokenizer that a folder holds."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from mhesa.errors import InputError
from mhesa.file_names import TOKENIZER, TOKENIZER_CONFIG
from mhesa.tokenizers.bytes import BYTE_TOKENIZER, END_OF_TEXT, Bytes
from mhesa.tokenizers.config import read_chat_template, read_config, token_text
from mhesa.tokenizers.vocabulary import TextTokenizer

# Names of the end-of-text token, to look for where no tokenizer_config.json gives it.
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
    values = read_config(file.parent)
    # Special tokens only: an ordinary token of such a name was learnt from text.
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    likely = next((name for name in ENDS_OF_TEXT if name in special), END_OF_TEXT)
    end, padding = token_text(values.get("eos_token")) or likely, token_text(values.get("pad_token"))
    return TextTokenizer(tokenizer, end, read_chat_template(file.parent, values), padding)


def _byte_tokenizer(folder: Path) -> Bytes:
    values = read_config(folder)
    name = values.get("tokenizer_class")
    if name != BYTE_TOKENIZER:
        raise InputError(f"{folder} has a {name} without a {TOKENIZER}; save it as a fast tokenizer first")
    try:
        added = {
            int(index): AddedToken(str(token["content"]), special=bool(token["special"]))
            for index, token in values.get("added_tokens_decoder", {}).items()
        }
        end = token_text(values.get("eos_token")) or END_OF_TEXT
        return Bytes(added, end, read_chat_template(folder, values), token_text(values.get("pad_token")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / TOKENIZER_CONFIG} is damaged: {error}") from error
