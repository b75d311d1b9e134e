"""The tokenizer of bytes for transformers: any bytes and ids survive, text is never touched."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer

from mhesa.hf import ByteTokenizer, MhesaConfig

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer():
    return ByteTokenizer()


def text_of(data):
    return data.decode("utf-8", "surrogateescape")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_survive_as_text(data):
    tokenizer = ByteTokenizer(errors="surrogateescape")
    ids = tokenizer.encode(text_of(data))
    assert tokenizer.decode(ids).encode("utf-8", "surrogateescape") == data
    assert ids == list(data) == tokenizer.encode_bytes(data).tolist()
    assert tokenizer.decode_bytes(ids) == data


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=40))
def test_any_ids_survive_as_text(ids):
    tokenizer = ByteTokenizer(errors="surrogateescape")
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces  ",
        "a .",
        "do n't",
        " ,x ?",
        "\n\r\n\t",
        "\x00nul\x00",
        "\ufffd",
        "\ufeffx",
        "né 日本 🙂",
    ],
    ids=ascii,
)
def test_text_is_never_touched(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == text
    assert tokenizer.batch_decode([ids, ids]) == [text, text]


def test_every_lone_surrogate_is_encoded(tokenizer):
    assert tokenizer.encode("\udc80\udcff") == [0x80, 0xFF]
    for code in (0xD800, 0xDBFF, 0xDC00, 0xDC7F, 0xDD00, 0xDFFF):
        data = bytes(tokenizer.encode(f"a{chr(code)}\udcff"))
        assert data == b"a" + chr(code).encode("utf-8", "surrogatepass") + b"\xff"
        assert text_of(data) == tokenizer.decode(list(data), errors="surrogateescape")


def test_the_special_tokens_text_is_the_token(tokenizer):
    assert tokenizer.encode(f"a{END}{END} b") == [97, 256, 256, 32, 98]
    assert tokenizer.decode([97, 256, 98]) == f"a{END}b"
    assert tokenizer.decode([97, 256, 98], skip_special_tokens=True) == "ab"
    assert tokenizer.decode_bytes([97, 256, 98]) == b"ab"
    assert tokenizer.encode_bytes(END.encode()).tolist() == list(END.encode())
    assert tokenizer.encode(END, split_special_tokens=True) == list(END.encode())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 256, 256)


def test_the_vocabulary(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == tokenizer.vocab_size == len(vocabulary) == MhesaConfig().vocab_size
    assert sorted(vocabulary.values()) == list(range(257))
    for token, index in vocabulary.items():
        assert tokenizer.convert_tokens_to_ids(token) == index
        assert tokenizer.convert_ids_to_tokens(index) == token
    assert tokenizer.tokenize("né") == ["n", "<0xC3>", "<0xA9>"]
    assert tokenizer.convert_tokens_to_string(["n", "<0xC3>", "<0xA9>", END]) == f"né{END}"
    assert tokenizer.convert_tokens_to_ids("é") is None


@pytest.mark.parametrize("bad", [-1, 257, 100000])
def test_an_id_that_no_token_has(tokenizer, bad):
    for call in (tokenizer.decode, tokenizer.decode_bytes, tokenizer.convert_ids_to_tokens):
        with pytest.raises(ValueError, match=f"no token has the id {bad}; the largest is 256"):
            call([97, bad])


def test_errors_when_decoding(tokenizer):
    half = [110, 0xC3]
    assert tokenizer.decode(half) == "n\ufffd"
    assert tokenizer.batch_decode([half, [0xFF]]) == ["n\ufffd", "\ufffd"]
    assert tokenizer.decode(half, errors="surrogateescape") == "n\udcc3"
    assert ByteTokenizer(errors="ignore").decode(half) == "n"
    assert ByteTokenizer(errors="ignore").decode(half, errors="backslashreplace") == "n\\xc3"
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(half, errors="strict")
    with pytest.raises(ValueError, match="unknown errors 'lenient'; choose from replace"):
        ByteTokenizer(errors="lenient")
    with pytest.raises(ValueError, match="unknown errors 'lenient'"):
        tokenizer.decode(half, errors="lenient")


def test_a_batch_is_padded_on_the_left(tokenizer):
    batch = tokenizer(["a", "bcd", ""], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[256, 256, 97], [98, 99, 100], [256, 256, 256]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1], [0, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask"}
    right = ByteTokenizer(padding_side="right")(["a", "bc"], padding=True)
    assert right["input_ids"] == [[97, 256], [98, 99]]
    assert tokenizer("abcdef", truncation=True, max_length=3)["input_ids"] == [97, 98, 99]


def test_tensors_decode(tokenizer):
    ids = torch.tensor([[104, 105], [33, 256]])
    assert tokenizer.batch_decode(ids) == ["hi", f"!{END}"]
    assert tokenizer.decode_bytes(ids[0]) == b"hi"
    assert tokenizer.decode(ids[0, 0]) == "h"


def test_no_special_token_is_added(tokenizer):
    assert tokenizer.encode("a", add_special_tokens=True) == [97]
    assert tokenizer.num_special_tokens_to_add() == 0


def test_added_tokens(tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens(["é", "<|user|>", "<|user|>s"])
    tokenizer.add_tokens([AddedToken("<|tool|>", special=True)], special_tokens=True)
    text = "caf\u00e9 <|user|>s<|user|> \u00e8<|tool|>"
    ids = tokenizer.encode(text)
    assert ids == [*b"caf", 257, 32, 259, 258, 32, *"è".encode(), 260]
    tokenizer.save_pretrained(tmp_path)
    for same in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert same.encode(text) == ids
        assert same.decode(ids) == text
        assert same.decode(ids, skip_special_tokens=True) == text.replace("<|tool|>", "")
        assert same.decode_bytes(ids) == text.replace("<|tool|>", "").encode()
        assert len(same) == 261


def test_saving_needs_no_vocabulary_file(tmp_path):
    ByteTokenizer(errors="surrogateescape", padding_side="right").save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".py"]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is ByteTokenizer
    assert (loaded.errors, loaded.padding_side) == ("surrogateescape", "right")
    assert loaded.encode(f"né{END}") == [110, 0xC3, 0xA9, 256]
