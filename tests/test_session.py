"""Sessions: pieces against the whole, files that are damaged, somebody else's, or cannot be written."""

import copy
import errno
import itertools
import json
import math
import os
import pickle
import platform
import re
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mhesa import GatedExponentialSmoothingLM
from mhesa.errors import InputError
from mhesa.hf import ByteTokenizer
from mhesa.inference.decoder import Decoder
from mhesa.inference.generation import stream
from mhesa.inference.sampling import Sampling
from mhesa.inference.session import Reader, Session, fingerprint


def model_of(seed=0, **sizes):
    torch.manual_seed(seed)
    return GatedExponentialSmoothingLM(
        **{"num_tokens": 257, "dim": 16, "depth": 2, "heads": 2, "dim_mhesa": 8} | sizes
    ).eval()


@pytest.fixture(scope="module")
def reader():
    return Reader(model_of(), ByteTokenizer())


def ended_at(session):
    return session._memory.state.clone(), session._memory.token, session.position


def same(first, second):
    return torch.equal(first[0], second[0]) and first[1:] == second[1:]


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(st.binary(max_size=40), max_size=6))
def test_pieces_equal_one_call(reader, parts):
    whole, pieces, scored = (Session(reader) for _ in range(3))
    whole.feed(b"".join(parts))
    for part in parts:
        pieces.feed(part)
    bits = np.concatenate([np.zeros(0, np.float32), *(scored.score(part) for part in parts)])
    assert same(ended_at(whole), ended_at(pieces))
    assert same(ended_at(whole), ended_at(scored))
    assert len(bits) == len(b"".join(parts)) == whole.position


def test_scores_are_log_probabilities_of_one_pass(reader):
    text = "Größe: any bytes \x00, and then some.".encode() + b"\xff"
    with torch.no_grad():
        ids = torch.tensor([256, *text])
        expected = -reader.model.double()(ids[None, :-1])[0].log_softmax(-1)
    reader.model.float()
    expected = expected[torch.arange(len(text)), ids[1:]] / math.log(2)
    np.testing.assert_allclose(Session(reader).score(text), expected, atol=1e-5)


def test_generated_text_has_been_read(reader):
    generated, fed = Session(reader), Session(reader)
    generated.feed("abc")
    text = "".join(generated.stream(max_new_tokens=40, seed=4))
    ids = torch.tensor([256, *b"abc"])
    written = bytes(stream(reader.decoder, ids, max_new_tokens=40, seed=4, eos_token_id=256))
    fed.feed(b"abc" + written)
    assert same(ended_at(generated), ended_at(fed))
    assert text == written.decode("utf-8", "replace")


def test_a_model_of_no_numbers_is_an_error(tmp_path):
    model = GatedExponentialSmoothingLM(num_tokens=257, dim=16, depth=1, heads=2, dim_mhesa=8).eval()
    model.to_logits.weight.data[3] = torch.nan
    session = Session(Reader(model, ByteTokenizer()))
    with pytest.raises(FloatingPointError, match="the model's logits are not numbers"):
        session.score("text")
    with pytest.raises(FloatingPointError), Session.open(tmp_path / "file", session.reader) as session:
        session.score("text")
    assert not (tmp_path / "file").exists()


def test_a_fork_goes_its_own_way_and_the_first_can_come_back(reader):
    session = Session(reader)
    session.feed("the same beginning")
    before = ended_at(session)
    fork = session.fork()
    first = fork.generate(max_new_tokens=20, seed=1)
    assert same(ended_at(session), before)
    assert session.fork().generate(max_new_tokens=20, seed=1) == first
    assert fork.position == session.position + 20


def test_stop_texts_end_and_are_not_given_out(reader):
    whole = Session(reader).generate(max_new_tokens=60, sampling=Sampling(temperature=3.0), seed=1)
    ending = re.search("[!-~]{2}", whole)[0]
    session = Session(reader)
    text = session.generate(
        max_new_tokens=60, sampling=Sampling(temperature=3.0), seed=1, stop=["~never~", ending]
    )
    assert text == whole[: whole.index(ending)]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_token_that_the_tokenizer_lacks_is_never_drawn(temperature):
    """A vocabulary that is padded, as `resize_token_embeddings(pad_to_multiple_of=8)` makes it."""
    padded, cut = model_of(num_tokens=264), model_of()
    with torch.no_grad():
        padded.to_logits.weight[257:] *= 100
        cut.token_emb.weight.copy_(padded.token_emb.weight[:257])
        cut.to_logits.weight.copy_(padded.to_logits.weight[:257])
    cut.layers = padded.layers
    arguments = {"max_new_tokens": 40, "sampling": Sampling(temperature=temperature), "seed": 1}
    assert max(stream(padded, torch.tensor([97]), **arguments)) > 256
    texts = [Session(Reader(model, ByteTokenizer())) for model in (padded, cut)]
    assert texts[0].generate(**arguments) == texts[1].generate(**arguments)
    assert same(ended_at(texts[0]), ended_at(texts[1]))
    with pytest.raises(InputError, match="token ids must be 0 to 256, not 257"):
        texts[0].generate(max_new_tokens=1, sampling=Sampling(logit_bias={257: 1}))


def test_an_end_of_text_ends_and_another_text_begins(reader):
    model = model_of()
    with torch.no_grad():
        # Whatever was read, the end is the likeliest.
        model.to_logits.weight.zero_()
        for block in model.layers:
            block.to_out.weight.zero_()
            block.to_out.bias.zero_()
        model.token_emb.weight[97], model.to_logits.weight[256] = 1.0, 1.0
    session = Session(Reader(model, ByteTokenizer()))
    session.feed("a")
    assert session.generate(max_new_tokens=5, sampling=Sampling(temperature=0)) == ""
    assert (session.position, session._memory.token) == (2, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_continues_where_the_session_was(tmp_path, dtype):
    path = tmp_path / "talk.session"
    model = model_of(depth=12, dim_mhesa=512, heads=8)
    session = Session(Reader(model.to(dtype), ByteTokenizer()))
    session.feed("so it begins " * 20)
    session.save(path)
    assert path.stat().st_size <= 32 * 1024
    again = Session.load(path, session.reader)
    assert same(ended_at(again), ended_at(session))
    assert again.generate(max_new_tokens=30, seed=1) == session.generate(max_new_tokens=30, seed=1)
    assert [file.name for file in tmp_path.iterdir()] == ["talk.session"]


def test_the_precision_does_not_make_another_model():
    assert fingerprint(model_of()) == fingerprint(model_of().bfloat16())
    assert fingerprint(model_of()) != fingerprint(model_of(seed=1))


def damage(path, kind):
    data = path.read_bytes()
    if kind == "cut":
        path.write_bytes(data[:-9])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(bytes(range(256)) * 9)
    elif kind == "shape":
        size = int.from_bytes(data[:8], "little")
        details = json.loads(data[8 : 8 + size])["__metadata__"]
        save_file({"state": torch.zeros(3, 8)}, path, metadata=details)
    elif kind == "NaN":
        path.write_bytes(data[:-8] + b"\xff" * 8)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "weights":
        save_file({"weight": torch.zeros(3)}, path)
    else:
        size = int.from_bytes(data[:8], "little")
        details = json.loads(data[8 : 8 + size])["__metadata__"] | {"token": kind}
        save_file(load_file(path), path, metadata=details)


@pytest.mark.parametrize(
    "kind", ["cut", "empty", "noise", "shape", "NaN", "folder", "weights", "700", "-1", "x"]
)
def test_a_damaged_file_is_refused_by_name(reader, tmp_path, kind):
    path = tmp_path / "talk.session"
    Session(reader).save(path)
    damage(path, kind)
    with pytest.raises(InputError, match=r"talk\.session") as caught:
        Session.load(path, reader)
    assert "\n" not in str(caught.value)


def test_another_models_file_is_refused(reader, tmp_path):
    Session(Reader(model_of(seed=1), ByteTokenizer())).save(tmp_path / "a")
    with pytest.raises(InputError, match="another model"):
        Session.load(tmp_path / "a", reader)


def test_a_file_that_is_not_there_is_named(reader, tmp_path):
    with pytest.raises(InputError, match="no saved session"):
        Session.load(tmp_path / "nothing", reader)
    with pytest.raises(InputError, match="cannot write"):
        Session(reader).save(tmp_path / "no" / "folder")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_leaves_the_old_file(reader, tmp_path, monkeypatch):
    path = tmp_path / "talk.session"
    session = Session(reader)
    session.feed("kept")
    session.save(path)
    before = path.read_bytes()
    # The file that is written beside the old one is on a disk without room.
    (tmp_path / ".talk.session.partial").symlink_to("/dev/full")
    session.feed("lost")
    with pytest.raises(InputError, match=os.strerror(errno.ENOSPC)):
        session.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["talk.session"]


def test_a_file_that_changed_since_it_was_read_is_not_replaced(reader, tmp_path):
    path = tmp_path / "talk.session"
    Session(reader).save(path)
    (tmp_path / "link").symlink_to(path)
    first, second = Session.load(path, reader), Session.load(tmp_path / "link", reader)
    fork = second.fork()
    first.feed("the first one's text")
    first.save(path)
    written = path.read_bytes()
    for late in (second, fork):
        late.feed("the other's")
        for name in (path, tmp_path / "link"):
            with pytest.raises(InputError, match="has changed since it was read; load it again, or save to"):
                late.save(name)
    assert path.read_bytes() == written
    second.save(tmp_path / "other")
    first.feed("more")
    first.save(path)
    # Who never read the file says that it is to be replaced.
    Session(reader).save(path)
    assert Session.load(path, reader).position == 0
    path.unlink()
    with pytest.raises(InputError, match="has changed since it was read"):
        first.save(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "other"]


def test_a_session_is_open_once(reader, tmp_path):
    path = tmp_path / "talk.session"
    holder = f"process {os.getpid()} on {platform.node()}"
    for length in (4, 8):
        with Session.open(path, reader) as session:
            session.feed("text")
            for late in (Session(reader).save, lambda path: Session.open(path, reader).__enter__()):
                with pytest.raises(InputError, match=rf"talk.session is being written by {holder}; wait"):
                    late(path)
        assert Session.load(path, reader).position == length
        assert [file.name for file in tmp_path.iterdir()] == ["talk.session"]
    for name in (path, tmp_path / "new"):
        with pytest.raises(InputError, match="has changed"), Session.open(name, reader):
            name.write_bytes(b"of another program")
    assert path.read_bytes() == (tmp_path / "new").read_bytes() == b"of another program"
    with (
        pytest.raises(InputError, match="is a folder, a device or a pipe"),
        Session.open("/dev/null", reader),
    ):
        pass


@pytest.mark.parametrize("method", ["feed_ids", "score_ids"])
def test_ids_are_checked_before_any_is_read(reader, method):
    session = Session(reader)
    session.feed("text")
    before = ended_at(session)
    for ids, error in [
        (torch.tensor([97, 257]), IndexError),
        (torch.tensor([-1, 97]), IndexError),
        (torch.tensor([97], dtype=torch.int32), InputError),
        (torch.tensor([[97]]), InputError),
        ([97], InputError),
    ]:
        with pytest.raises(error, match="ids must be"):
            getattr(session, method)(ids)
        assert same(ended_at(session), before)


# Interrupted


def interrupted(monkeypatch, where, at):
    """Ctrl-C in the middle: a decoder's method changes the state and is interrupted, at its call `at`."""
    whole, calls = getattr(Decoder, where), itertools.count(1)

    def run(self, *arguments):
        found = whole(self, *arguments)
        if next(calls) == at:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Decoder, where, run)


@pytest.mark.parametrize(("method", "where"), [("feed", "prefill"), ("score", "surprisal")])
def test_an_interrupted_read_reads_nothing(reader, monkeypatch, tmp_path, method, where):
    with Session.open(tmp_path / "s", reader) as kept:
        kept.feed("hello ")
    before = ended_at(kept)
    monkeypatch.setattr("mhesa.inference.session.PIECE_BYTES", 10)
    interrupted(monkeypatch, where, 3)
    with pytest.raises(KeyboardInterrupt), Session.open(tmp_path / "s", reader) as session:
        getattr(session, method)("abcdefgh\n" * 10)
    assert same(ended_at(session), before)
    assert same(ended_at(Session.load(tmp_path / "s", reader)), before)


def test_an_interrupted_text_stands_after_the_tokens_drawn(reader, monkeypatch):
    interrupted(monkeypatch, "step", 5)
    session, given = Session(reader), []
    with pytest.raises(KeyboardInterrupt):
        given.extend(session.stream(max_new_tokens=50, seed=3))
    monkeypatch.undo()
    assert session.position == 5
    other = Session(reader)
    text = other.generate(max_new_tokens=5, seed=3)
    assert same(ended_at(session), ended_at(other))
    assert text.startswith("".join(given))


def test_a_session_does_one_thing_at_a_time(reader):
    session = Session(reader)
    text = session.stream(max_new_tokens=50, seed=3)
    next(text)
    session.feed("x")
    with pytest.raises(InputError, match="has read something else"):
        list(text)


def test_a_long_text_is_read_in_pieces_to_the_same_state(reader, monkeypatch):
    whole, pieces = Session(reader), Session(reader)
    text = "line one\nline two é\n" * 30
    bits = whole.score(text)
    monkeypatch.setattr("mhesa.inference.session.PIECE_BYTES", 37)
    np.testing.assert_array_equal(pieces.score(text), bits)
    assert same(ended_at(pieces), ended_at(whole))


def test_a_repetition_penalty_sees_the_continuation_alone(reader):
    """Not the token that the text ends with, which the model has not read yet."""
    session = Session(reader)
    session.feed("abx")
    plain = session.fork().generate(max_new_tokens=1, sampling=Sampling(temperature=0))
    for penalty in (1e-30, 1e30):
        drawn = Sampling(temperature=0, repetition_penalty=penalty)
        assert session.fork().generate(max_new_tokens=1, sampling=drawn, seed=np.int64(1)) == plain


def test_one_stop_string_needs_no_list(reader):
    texts = [Session(reader).generate(max_new_tokens=99, seed=1, stop=stop) for stop in ("ab", ["ab"])]
    assert texts[0] == texts[1]


def test_copies_are_refused_and_say_what_to_do(reader):
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match=r"use fork\(\) or save\(\)"):
            make(Session(reader))


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused():
    with pytest.raises(InputError, match="it has 257 tokens and the model 100"):
        Reader(model_of(num_tokens=100), ByteTokenizer())


def test_a_session_in_another_type_is_named(reader, tmp_path):
    Session(Reader(model_of().double(), ByteTokenizer())).save(tmp_path / "s")
    with pytest.raises(InputError, match=r"is a session in torch.float64; this model's are in torch.float32"):
        Session.load(tmp_path / "s", reader)


def test_no_flipped_byte_is_read_as_something_else(reader, tmp_path):
    session = Session(reader)
    session.feed("a text")
    session.save(tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 7
        (tmp_path / "s").write_bytes(damaged)
        # What is not read, as the name of another entry, may be anything.
        with suppress(InputError):
            assert same(ended_at(Session.load(tmp_path / "s", reader)), ended_at(session))
