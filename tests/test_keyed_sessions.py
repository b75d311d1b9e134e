"""A session for each key is the session that the key's lines would have alone."""

import sqlite3

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhesa import GatedExponentialSmoothingLM, KeyedSessions, Reader, Session
from mhesa.errors import InputError
from mhesa.inference.keyed_sessions import BYTES_PER_KEY
from mhesa.tokenizers import Bytes


def new_reader(seed=0):
    torch.manual_seed(seed)
    model = GatedExponentialSmoothingLM(
        num_tokens=257, dim=16, depth=2, heads=2, dim_mhesa=8, adaptive=True, conv_size=3
    )
    return Reader(model.eval(), Bytes())


@pytest.fixture(scope="module")
def reader():
    return new_reader()


def memory_of(reader, states):
    """Bytes for as many states in memory, and no more."""
    size = reader.decoder.initial_state(1).nbytes + BYTES_PER_KEY
    return int(states * size * 16 / 15) + 16


def alone(reader, lines):
    """The bits of each line where each key has a `Session` of its own."""
    sessions = {key: Session(reader) for key, _ in lines}
    return [sessions[key].score(text) for key, text in lines]


LINES = st.lists(st.tuples(st.sampled_from("abcdef"), st.binary(max_size=12)), max_size=30)


@settings(max_examples=40, deadline=None)
@given(lines=LINES, states=st.integers(1, 7), cut=st.integers(0, 30))
def test_surprisals_equal_those_of_a_session_for_each_key(reader, lines, states, cut):
    with KeyedSessions(reader, memory=memory_of(reader, states)) as sessions:
        found = sessions.score(lines[:cut]) + sessions.score(lines[cut:])
    for bits, expected in zip(found, alone(reader, lines), strict=True):
        np.testing.assert_allclose(bits, expected, atol=1e-5)


def test_more_keys_than_the_decoder_takes_at_once_and_lines_longer_than_a_window(reader):
    lines = [(str(index % 300), b"line %d " % index) for index in range(900)] + [("7", b"long " * 2000)]
    with KeyedSessions(reader) as sessions:
        for bits, expected in zip(sessions.score(lines), alone(reader, lines), strict=True):
            np.testing.assert_allclose(bits, expected, atol=1e-5)


def test_a_file_goes_on_from_its_last_commit(reader, tmp_path):
    lines = [("a", b"one"), ("b", b"two"), ("a", b"three"), ("b", b"four")]
    expected = alone(reader, lines)
    path = tmp_path / "log.state"
    sessions = KeyedSessions(reader, path=path, memory=memory_of(reader, 1))
    sessions.score(lines[:2])
    sessions.commit({"position": "2"})
    # Of both keys, one state is in memory and one in the database's transaction.
    sessions.score(lines[2:])
    sessions.close()
    with KeyedSessions(reader, path=path) as sessions:
        assert (sessions.note("position"), sessions.note("nothing")) == ("2", None)
        for bits, wanted in zip(sessions.score(lines[2:]), expected[2:], strict=True):
            np.testing.assert_allclose(bits, wanted, atol=1e-5)


def test_a_key_may_be_anything(reader):
    keys = ["", "é", "\udcff", "x" * 1_000_000, "x" * 999_999]
    lines = [(key, b"line %d" % index) for index, key in enumerate(keys * 2)]
    with KeyedSessions(reader) as sessions:
        for bits, expected in zip(sessions.score(lines), alone(reader, lines), strict=True):
            np.testing.assert_allclose(bits, expected, atol=1e-5)


def test_foreign_and_damaged_files_are_refused_and_kept(reader, tmp_path):
    path = tmp_path / "log.state"
    with KeyedSessions(reader, path=path) as sessions:
        sessions.score([("a", b"text")])
        with pytest.raises(InputError, match=r"log\.state is being written by process"):
            KeyedSessions(reader, path=path)
    with pytest.raises(InputError, match=r"log\.state holds sessions with another model"):
        KeyedSessions(new_reader(1), path=path)
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    with pytest.raises(InputError, match=r"cannot keep sessions in .*log\.state"):
        KeyedSessions(reader, path=path)
    for content in (b"no database" * 100, whole[::-1]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a database"):
            KeyedSessions(reader, path=path)
        assert path.read_bytes() == content
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE other (x)")
    with pytest.raises(InputError, match="not a database of a session for each key"):
        KeyedSessions(reader, path=path)
    with pytest.raises(InputError, match="cannot write to"):
        KeyedSessions(reader, path=tmp_path / "no" / "state")


def test_a_state_that_does_not_fit_is_refused(reader, tmp_path):
    path = tmp_path / "log.state"
    with KeyedSessions(reader, path=path) as sessions:
        sessions.score([("a", b"text")])
    with sqlite3.connect(path) as database:
        database.execute("UPDATE sessions SET state = zeroblob(5)")
    # With memory for one state, the slot of "b" is free while that of "a" is read.
    with KeyedSessions(reader, memory=memory_of(reader, 1), path=path) as sessions:
        expected = sessions.score([("b", b"text")])
        with pytest.raises(InputError, match="is damaged"):
            sessions.score([("a", b"more")])
        found = sessions.score([("b", b"next"), ("c", b"text")])
    assert np.array_equal(found[0], alone(reader, [("b", b"text"), ("b", b"next")])[1])
    assert np.array_equal(found[1], expected[0])


def test_too_little_memory_is_refused(reader):
    with pytest.raises(InputError, match="too little memory for a session"):
        KeyedSessions(reader, memory=100)


def test_closed_sessions_read_nothing(reader, tmp_path):
    with KeyedSessions(reader, path=tmp_path / "k") as sessions:
        sessions.score(iter([("a", b"1")]))
    with pytest.raises(InputError, match="are closed"):
        sessions.score([("a", b"2")])
    with KeyedSessions(reader, path=tmp_path / "k") as sessions:
        assert len(sessions.score(line for line in [("a", b"2"), ("b", b"3")])) == 2
