"""Bytes as tokens, with transformers' methods: no vocabulary file, and no unknown character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from mhesa import remote_code
from mhesa.hf.auto_class import NoSourceCopies
from mhesa.tokenizers.bytes import END_OF_TEXT, END_OF_TEXT_ID, Bytes, to_bytes, token_splitter

ERRORS = ("replace", "surrogateescape", "ignore", "backslashreplace", "strict")

# ASCII stands for itself. Other bytes are spelled out, so that a letter such as "é", two bytes, can be added
# as a token.
BYTE_TOKENS = [chr(byte) if byte < 128 else f"<0x{byte:02X}>" for byte in range(256)]
BYTE_IDS = {token: byte for byte, token in enumerate(BYTE_TOKENS)}


class ByteTokenizer(NoSourceCopies, PreTrainedTokenizer, Bytes):  # type: ignore[misc]  # transformers' own methods win
    r"""Bytes of UTF-8 as tokens: ids 0 to 255 are the bytes, 256 is `<|endoftext|>`.

    Decoding replaces bytes that are not UTF-8 by `\ufffd`, so that text can be printed. With
    `errors="surrogateescape"` nothing is lost: such a byte becomes a lone surrogate, and encoding the text
    again gives back every byte. Any other lone surrogate, which no UTF-8 can hold, is encoded to the three
    bytes `surrogatepass` gives it.

    `<|endoftext|>` begins, ends and pads. As in GPT-2, text that contains it literally gets the token:
    use `split_special_tokens=True` or `encode_bytes` for text that is not to be trusted. Nothing is added
    to a text by itself, spaces are never touched, and padding goes to the left, as generation needs it.

    Args:
        errors: what decoding does with bytes that are not UTF-8, one of `"replace"`,
            `"surrogateescape"`, `"ignore"`, `"backslashreplace"`, `"strict"`; `decode` takes it too.

    Raises:
        ValueError: an `errors` of another name.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("né<|endoftext|>")
    [110, 195, 169, 256]
    >>> tokenizer.decode([110, 195]), tokenizer.decode([110, 195], errors="surrogateescape")
    ('n\ufffd', 'n\udcc3')
    >>> tokenizer.decode_bytes(tokenizer.encode_bytes(b"\xff\x00"))
    b'\xff\x00'
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 transformers' own is no ClassVar

    def __init__(
        self,
        errors: str = "replace",
        bos_token: str | AddedToken | None = END_OF_TEXT,
        eos_token: str | AddedToken | None = END_OF_TEXT,
        pad_token: str | AddedToken | None = END_OF_TEXT,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> None:
        self.errors = _check_errors(errors)
        self._added_tokens_decoder = {END_OF_TEXT_ID: AddedToken(END_OF_TEXT, special=True, normalized=False)}
        kwargs |= {"clean_up_tokenization_spaces": False, "auto_map": remote_code.BYTES}
        super().__init__(  # type: ignore[no-untyped-call]
            errors=errors,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            padding_side=padding_side,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """The bytes and the end-of-text token, 257."""
        return 257

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id: ASCII as itself, other bytes as `<0xE9>`, then the added tokens."""
        return BYTE_IDS | self._added_tokens_encoder

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:  # type: ignore[override]
        """The tokens of `text`; `split_special_tokens=True` takes special tokens' text for bytes too."""
        if kwargs.get("split_special_tokens", self.split_special_tokens):
            return self._tokenize(text)
        added = self._added_tokens_encoder
        pieces = token_splitter(added).split(text)
        return [token for piece in pieces for token in ([piece] if piece in added else self._tokenize(piece))]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or the ids of a list of them; `None` for an unknown token."""
        vocabulary = self.get_vocab()
        return vocabulary.get(tokens) if isinstance(tokens, str) else list(map(vocabulary.get, tokens))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of `tokens`."""
        return self._decode(self.convert_tokens_to_ids(tokens))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write what `auto_map` names; there is no vocabulary file."""
        return (str(remote_code.write_module(Path(save_directory))),)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [BYTE_TOKENS[byte] for byte in to_bytes(text)]

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < 256:
            raise ValueError(f"no token has the id {index}; the largest is {len(self) - 1}")
        return BYTE_TOKENS[index]

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        data = self._join(ids, self.pieces(skip_special_tokens))
        return data.decode("utf-8", self.errors if errors is None else _check_errors(errors))


def _check_errors(errors: str) -> str:
    if errors not in ERRORS:
        raise ValueError(f"unknown errors {errors!r}; choose from {', '.join(ERRORS)}")
    return errors
