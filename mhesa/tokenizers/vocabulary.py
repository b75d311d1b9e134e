"""Text as tokens of a vocabulary: byte-pair encoding made of a corpus, or any `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mhesa.atomic_io import write_file
from mhesa.errors import InputError
from mhesa.file_names import TOKENIZER
from mhesa.tokenizers import base
from mhesa.tokenizers.bytes import END_OF_TEXT
from mhesa.tokenizers.chat import mark
from mhesa.tokenizers.config import write_config

# The padding token of vocabularies made here.
PADDING = "<|padding|>"
# transformers' name for a tokenizer that a tokenizer.json describes.
FAST_TOKENIZER = "PreTrainedTokenizerFast"
# A byte that is not UTF-8, as "surrogateescape" decodes it.
NOT_UTF8 = re.compile("([\udc80-\udcff])")
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class TextTokenizer(base.Tokenizer):
    """A tokenizer of the `tokenizers` package that takes and gives bytes.

    With a byte-level vocabulary, as `train_bpe` makes them, nothing is lost: bytes that are not UTF-8
    become tokens of one byte each. Any other vocabulary reads UTF-8 alone. The text of a special token is
    tokenised as text, not recognised.

    Args:
        tokenizer: what makes ids of text.
        eos_token: the token that begins and ends documents; added if the vocabulary has none.
        chat_template: how a conversation becomes text, a Jinja template as transformers takes them.
        pad_token: the token that fills rows in transformers; `eos_token` if omitted or not in the vocabulary.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token: str = END_OF_TEXT,
        chat_template: str | None = None,
        pad_token: str | None = None,
    ) -> None:
        if tokenizer.token_to_id(eos_token) is None:
            tokenizer.add_special_tokens([AddedToken(eos_token, special=True, normalized=False)])
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.eos_token, self.chat_template = eos_token, chat_template
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.pad_token = pad_token if pad_token in ids else eos_token
        self.eos_token_id, self.pad_token_id = ids[eos_token], ids[self.pad_token]

    def __len__(self) -> int:
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of several texts, `(tokens,)` each, computed on all cores; see the base class."""
        try:
            decoded = [text.decode() for text in texts]
        except UnicodeDecodeError:
            return [self._encode_any(text) for text in texts]
        encodings = self._for_text.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _found_sizes(self, ids: np.ndarray, text: bytes) -> np.ndarray:
        """By the characters that each token was made of; those of no token belong to the next one."""
        try:
            read = text.decode()
        except UnicodeDecodeError:
            return super()._found_sizes(ids, text)
        found = self._for_text.encode(read, add_special_tokens=False)
        if found.ids != ids.tolist() or not found.ids:
            return super()._found_sizes(ids, text)
        starts = np.cumsum([0, *(len(character.encode()) for character in read)])
        ends = np.maximum.accumulate(starts[[end for _, end in found.offsets]])
        ends[-1] = len(text)
        return np.diff(ends, prepend=0)

    def fingerprint(self) -> str:
        """A digest that differs between tokenizers that give different ids."""
        whole = json.loads(self.tokenizer.to_str())
        parts = {name: whole.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        return hashlib.sha256(json.dumps([self.eos_token, parts]).encode()).hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json`, and the chat template if there is one."""
        folder = Path(folder)
        write_config(folder, FAST_TOKENIZER, self)
        with write_file(folder / TOKENIZER) as file:
            file.write(self.tokenizer.to_str(pretty=True).encode())

    @cached_property
    def _for_text(self) -> Tokenizer:
        """The tokenizer, or a copy that finds no special tokens in a text, if they are words of the model."""
        # The merges of pairs make no special tokens.
        if isinstance(self.tokenizer.model, models.BPE):
            return self.tokenizer
        whole = json.loads(self.tokenizer.to_str())
        words = whole["model"]["vocab"]
        names = {self.special_tokens()[token] for token in self._special_but_unknown} & dict(words).keys()
        if not names:
            return self.tokenizer
        # Noncharacters are in no text that is meant for others.
        hidden = {name: f"\uffff{name}\uffff" for name in names}
        renamed = [(hidden.get(word, word), value) for word, value in dict(words).items()]
        whole["model"]["vocab"] = dict(renamed) if isinstance(words, dict) else renamed
        whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] not in names]
        copy = Tokenizer.from_str(json.dumps(whole))
        copy.encode_special_tokens = True
        return copy

    def _added_tokens(self) -> dict[int, AddedToken]:
        return self.tokenizer.get_added_tokens_decoder()

    def _encode_marked(self, text: str) -> list[int]:
        tokenizer, ids = self._with_marks
        found = tokenizer.encode(text, add_special_tokens=False).ids
        for token in (set(found) - ids.keys()) & self._special_but_unknown:
            name = self.tokenizer.id_to_token(token)
            raise InputError(f"this tokenizer cannot tell the text {name} from the token of that name")
        return [ids.get(token, token) for token in found]

    @cached_property
    def _with_marks(self) -> tuple[Tokenizer, dict[int, int]]:
        """A copy that recognises marks instead of special tokens, and our ids of its added tokens."""
        added, special = self._added_tokens(), self.special_tokens()
        whole = json.loads(self.tokenizer.to_str())
        whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] not in special]
        copy = Tokenizer.from_str(json.dumps(whole))
        for token in special:
            strips = ("single_word", "lstrip", "rstrip")
            flags = {name: getattr(added[token], name) for name in strips} if token in added else {}
            copy.add_special_tokens([AddedToken(mark(token), normalized=False, **flags)])
        names = {mark(token): token for token in special}
        names |= {added[token].content: token for token in added.keys() - special.keys()}
        ids = copy.get_vocab(with_added_tokens=True)
        return copy, {ids[name]: token for name, token in names.items()}

    @cached_property
    def _special_but_unknown(self) -> set[int]:
        """The special tokens without the one that stands for unknown text."""
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        return {token for token, text in self.special_tokens().items() if text != unknown}

    def _encode_any(self, data: bytes) -> np.ndarray:
        text = data.decode("utf-8", "surrogateescape")
        ids: list[int] = []
        place = 0
        for part in NOT_UTF8.split(text):
            if NOT_UTF8.fullmatch(part):
                byte = ord(part) - 0xDC00
                token = self.tokenizer.token_to_id(byte_alphabet()[byte]) if self._is_byte_level else None
                if token is None:
                    offset = len(text[:place].encode("utf-8", "surrogateescape"))
                    raise InputError(
                        f"byte {byte:#04x} at offset {offset:,} of {data[:20]!r}... is not UTF-8, and this "
                        "tokenizer reads text alone; use --tokenizer bytes"
                    )
                ids.append(token)
            elif part:
                ids += self._for_text.encode(part, add_special_tokens=False).ids
            place += len(part)
        return np.array(ids, dtype=np.uint32)

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.tokenizer.to_str()).get("decoder"))

    def pieces(self) -> dict[int, bytes]:
        """The bytes of every token by its id, none for a special one."""
        return self._bytes

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        table = {
            index: self._token_bytes(token, index)
            for token, index in self.tokenizer.get_vocab(with_added_tokens=False).items()
        }
        added = self._added_tokens()
        table |= {i: b"" if token.special else token.content.encode() for i, token in added.items()}
        return table

    def _token_bytes(self, token: str, index: int) -> bytes:
        if self._is_byte_level:
            try:
                return bytes(map(byte_alphabet().index, token))
            except ValueError:
                return token.encode()
        if BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        # Decode it twice and take the second: the first token of a text may lose its space.
        before = self.tokenizer.decode([index])
        return self.tokenizer.decode([index, index]).removeprefix(before).encode()


def train_bpe(text: Iterable[bytes], size: int) -> TextTokenizer:
    """Make a byte-level vocabulary of `size` tokens by byte-pair encoding (https://arxiv.org/abs/1508.07909).

    Args:
        text: pieces of text to learn it from.
        size: number of tokens: 256 bytes and end of text among them; from 258 on padding too, the last.

    >>> tokenizer = train_bpe([b"abab abab ab"] * 10, 260)
    >>> tokenizer.decode_bytes(tokenizer.encode_bytes(b"ab\\xff"))
    b'ab\\xff'
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(size - 1, 257),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece.decode("utf-8", "ignore") for piece in text), trainer)
    if size > tokenizer.get_vocab_size():
        tokenizer.add_special_tokens([AddedToken(PADDING, special=True, normalized=False)])
    return TextTokenizer(tokenizer, pad_token=PADDING)


@cache
def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies, as GPT-2 chose them."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = map(chr, range(256, 512))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]
