"""Vocabularies made of a corpus, and those of others."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from mhesa.errors import InputError
from mhesa.hf import ByteTokenizer
from mhesa.tokenizers import Bytes, open_tokenizer
from mhesa.tokenizers.vocabulary import TextTokenizer, byte_alphabet, train_bpe

TEXT = (
    "The quick brown fox jumps over the lazy dog, naïvely; 狐が跳ぶ 🦊.\n" * 30
    + Path(json.__file__).read_text()
)
BPE = train_bpe([TEXT.encode()], 400)


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_come_back(data):
    assert BPE.decode_bytes(BPE.encode_bytes(data)) == data


def test_the_alphabet_is_that_of_tokenizers():
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é\n a")
    assert "".join(byte_alphabet()[byte] for byte in "é\n a".encode()) == encoded[0][0]


@pytest.mark.parametrize("use_regex", [True, False])
def test_text_like_a_byte_token_comes_back_from_a_byte_level_vocabulary(use_regex):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=byte_alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["<0x41>"] * 50, trainer)
    assert ("<0x41>" in tokenizer.get_vocab()) == (not use_regex)
    found = TextTokenizer(tokenizer)
    assert found.decode_bytes(found.encode_bytes(b"<0x41>")) == b"<0x41>"


@pytest.mark.parametrize("kind", ["unigram", "words"])
def test_special_tokens_that_are_words_of_the_model_are_not_found_in_texts(kind):
    special = ["<unk>", "</s>"]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat </ s > on the mat < unk >"] * 9, trainer)
    found = TextTokenizer(tokenizer, eos_token="</s>")
    assert found.eos_token_id in found.tokenizer.encode("the </s> cat", add_special_tokens=False).ids
    for data in (b"the </s> cat", b"</s>", b"the cat </s>\n"):
        assert found.eos_token_id not in found.encode_bytes(data)
    if kind == "unigram":
        assert found.decode_bytes(found.encode_bytes(b"the </s> cat")) == b" the </s> cat"
    assert found.encode_with_special_tokens("cat </s>")[-1] == found.eos_token_id
    tokenizer.add_special_tokens(["<extra>"])
    tokenizer.add_tokens(["foo"])
    added = TextTokenizer(tokenizer, eos_token="</s>")
    assert added.encode_bytes(b"the foo")[-1] == tokenizer.token_to_id("foo")


def test_a_vocabulary_has_the_size_asked_for_and_compresses():
    assert len(BPE) == 400
    assert train_bpe([TEXT.encode()], 400).fingerprint() == BPE.fingerprint()
    assert train_bpe([TEXT.encode()], 300).fingerprint() != BPE.fingerprint()


def test_bytes_that_are_no_text_teach_a_vocabulary_nothing():
    latin = "é".encode("latin-1")
    tokenizer = train_bpe([b"caf" + latin + b" the caf" + latin + b" "] * 20, 262)
    learnt = [tokenizer.decode_bytes([token]) for token in range(262)]
    assert b"caf" in learnt
    assert not any("\ufffd".encode()[:2] in token for token in learnt)


def test_a_vocabulary_has_a_padding_token_of_its_own(tmp_path):
    assert (BPE.pad_token, BPE.pad_token_id) == ("<|padding|>", 399)
    assert 399 not in BPE.encode_bytes(b"<|padding|>")
    assert BPE.decode_bytes([399]) == b""
    smallest = train_bpe([TEXT.encode()], 257)
    assert len(smallest) == 257
    assert smallest.pad_token_id == smallest.eos_token_id
    for tokenizer in (BPE, smallest):
        tokenizer.save_pretrained(tmp_path)
        again = open_tokenizer(tmp_path)
        assert (again.pad_token, again.pad_token_id) == (tokenizer.pad_token, tokenizer.pad_token_id)
        assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == tokenizer.pad_token_id


def test_fine_tuning_sees_the_end_of_text(tmp_path):
    """transformers' collator ignores every label that is the padding token."""
    BPE.save_pretrained(tmp_path)
    vocabulary = AutoTokenizer.from_pretrained(tmp_path)
    more = ByteTokenizer()
    more.add_special_tokens({"pad_token": "<|padding|>"})
    more.save_pretrained(tmp_path / "bytes")
    saved = open_tokenizer(tmp_path / "bytes")
    assert (saved.pad_token_id, len(saved)) == (257, 258)
    saved.save_pretrained(tmp_path / "again")
    for tokenizer in (vocabulary, AutoTokenizer.from_pretrained(tmp_path / "again")):
        texts = [tokenizer(text + tokenizer.eos_token) for text in ("a", "three words here")]
        batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(texts)
        assert (batch["labels"] == -100).equal(batch["attention_mask"] == 0)
        assert (batch["labels"][:, -1] == tokenizer.eos_token_id).all()


def test_end_of_text_in_a_text_is_text():
    ids = BPE.encode_bytes(b"one<|endoftext|>two")
    assert BPE.eos_token_id not in ids
    assert BPE.decode_bytes(ids) == b"one<|endoftext|>two"
    assert BPE.decode_bytes([BPE.eos_token_id]) == b""
    with pytest.raises(ValueError, match="no token has the id 400; the largest is 399"):
        BPE.decode_bytes([400])


def test_a_saved_vocabulary_is_the_same_to_us_and_to_transformers(tmp_path):
    BPE.save_pretrained(tmp_path)
    ours, theirs = open_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.fingerprint() == BPE.fingerprint()
    ids = BPE.encode_bytes(TEXT.encode()).tolist()
    assert (
        ours.encode_bytes(TEXT.encode()).tolist()
        == theirs(TEXT, split_special_tokens=True)["input_ids"]
        == ids
    )
    assert theirs.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode()) * 0.6
    assert theirs.eos_token_id == BPE.eos_token_id


def test_bytes_are_a_tokenizer_too(tmp_path):
    ByteTokenizer().save_pretrained(tmp_path)
    assert type(open_tokenizer(tmp_path)) is Bytes
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ByteTokenizer


def words():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]", "[SEP]"])
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def sentencepiece():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    specials = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=500, special_tokens=specials[:1]))
    return tokenizer


@pytest.mark.parametrize(("make", "end"), [(words, "[SEP]"), (sentencepiece, "</s>")])
def test_vocabularies_of_others(tmp_path, make, end):
    make().save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.eos_token_id == tokenizer.tokenizer.token_to_id(end)
    data = b"the quick brown fox"
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)).strip() == data
    with pytest.raises(InputError, match=r"byte 0xff at offset 4 of .* is not UTF-8.*use --tokenizer bytes"):
        tokenizer.encode_bytes(b"fox \xff")


def test_the_configuration_names_the_end_of_text(tmp_path):
    tokenizer = words()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    assert open_tokenizer(tmp_path).eos_token == "<end>"


def test_a_vocabulary_without_an_end_gets_one():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert TextTokenizer(tokenizer).eos_token_id == 2


def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match="there is no tokenizer at"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer: "):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(InputError, match=r"has a GPT2Tokenizer without a tokenizer.json"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(InputError, match=r"tokenizer_config.json is damaged"):
        open_tokenizer(tmp_path)


def test_a_chat_template_is_kept_and_its_special_tokens_are_tokens(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}"
    tokenizer = open_tokenizer_of(tmp_path, template)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    assert ids == [*tokenizer.encode_bytes(b"hello").tolist(), tokenizer.eos_token_id]
    # In text it is text, also after a conversation.
    assert tokenizer.eos_token_id not in tokenizer.encode_bytes(b"<|endoftext|>").tolist()


def open_tokenizer_of(folder, template):
    TextTokenizer(BPE.tokenizer, chat_template=template).save_pretrained(folder)
    return open_tokenizer(folder)
