"""Compressed text, and rows of JSON lines and parquet."""

import bz2
import gzip
import json
import lzma
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from texts import joined, lines, tokens_of

from mhesa.data.sources import find_files, read_sources
from mhesa.errors import InputError

COMPRESSORS = {
    "gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    "xz": lambda path, data: path.write_bytes(lzma.compress(data)),
    "bz2": lambda path, data: path.write_bytes(bz2.compress(data)),
    "zst": lambda path, data: path.write_bytes(zstandard.compress(data)),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_text_is_read_as_plain_text_is(tmp_path, suffix):
    path = tmp_path / f"text.txt.{suffix}"
    COMPRESSORS[suffix](path, lines(50_000))
    assert [document.data for document in read_sources([str(path)])] == [lines(50_000)]


COMPRESS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstandard.compress,
}
SKIPPABLE = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"any"
VALID = {
    "gz": lambda a, b: gzip.compress(a, 0) + gzip.compress(b"") + gzip.compress(b, 9) + bytes(512),
    "gz with a name": lambda a, b: subprocess.run(["gzip", "-c"], input=a + b, stdout=-1, check=True).stdout,
    "xz": lambda a, b: lzma.compress(a, check=lzma.CHECK_SHA256) + bytes(8) + lzma.compress(b),
    "xz of the old form": lambda a, b: lzma.compress(a + b, format=lzma.FORMAT_ALONE),
    "bz2": lambda a, b: bz2.compress(a, 1) + bz2.compress(b, 9),
    "zst": lambda a, b: SKIPPABLE + zstandard.compress(a, 19) + SKIPPABLE + zstandard.compress(b),
    "zst without sizes": lambda a, b: zstandard.ZstdCompressor(
        write_content_size=False, write_checksum=True
    ).compress(a + b),
    "zst of a large window": lambda a, b: long_zstandard(a + b),
}


def long_zstandard(data):
    """As `zstd --long=31` makes it: the window is larger than decompressors allow by themselves."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return writer.compress(data) + writer.flush()


@pytest.mark.parametrize("name", VALID)
def test_valid_compression_of_any_kind_is_read(tmp_path, name):
    path = tmp_path / f"text.{name.split()[0]}"
    a, b = lines(20_000), lines(3000, "more")
    path.write_bytes(VALID[name](a, b))
    assert joined(read_sources([str(path)])) == a + b


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damage_after_the_first_stream_is_named(tmp_path, suffix):
    path = tmp_path / f"text.{suffix}"
    first, second = COMPRESS[suffix](lines(100)), COMPRESS[suffix](lines(200))
    for damaged in (first + second[:-5], first + b"garbage", first + second[:1]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"cannot read .*text\.{suffix}: its compressed data is "):
            read_sources([str(path)])


def test_an_unknown_dictionary_is_named(tmp_path):
    dictionary = zstandard.train_dictionary(4096, [b"sample %d of many" % n for n in range(2000)])
    (tmp_path / "text.zst").write_bytes(zstandard.ZstdCompressor(dict_data=dictionary).compress(lines(100)))
    with pytest.raises(InputError, match=r"text.zst: .*[Dd]ictionary"):
        read_sources([str(tmp_path)])


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_lines_are_rows(tmp_path, suffix):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS) * 1000
    (tmp_path / f"rows.jsonl.{suffix}").write_bytes(COMPRESS[suffix](rows.encode()))
    assert [document.data.decode() for document in read_sources([str(tmp_path)])] == TEXTS * 1000


@pytest.mark.parametrize("suffix", COMPRESS)
def test_an_empty_compressed_file_has_no_text(tmp_path, suffix):
    (tmp_path / f"text.{suffix}").touch()
    with pytest.raises(InputError, match="no text in"):
        read_sources([str(tmp_path)])


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"none of it"])
def test_damaged_compression_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"text.{suffix}"
    COMPRESSORS[suffix](path, lines(5000))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"cannot read .*text\.{suffix}: "):
        tokens_of(path)


TEXTS = ["first\nof two lines", "é漢", "third"]


def write_json_lines(path):
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS) + "\n")


def write_parquet(path):
    table = pyarrow.table({"text": TEXTS, "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize(
    ("name", "write"),
    [("rows.jsonl", write_json_lines), ("rows.parquet", write_parquet)],
)
def test_a_row_is_a_document(tmp_path, name, write):
    write(tmp_path / name)
    found = read_sources([str(tmp_path / name)])
    assert [document.data.decode() for document in found] == TEXTS
    assert found[1].name.endswith(f"{name}:2")
    with pytest.raises(InputError, match=r"rows.* has no field body; its fields are text, id: name one with"):
        read_sources([str(tmp_path / name)], "body")
    with pytest.raises(InputError, match="the field id holds int, not text"):
        read_sources([str(tmp_path / name)], "id")


def test_values_beside_the_text_may_be_of_any_size(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": ' + "9" * 10_000 + ', "x": 1e' + "9" * 5000 + ', "text": "one"}\n')
    assert joined(read_sources([str(path)])) == b"one"
    with pytest.raises(InputError, match="line 1: the field n holds int, not text"):
        read_sources([str(path)], "n")


@pytest.mark.parametrize("line", ["[" * 1_000_000, '{"text": ' * 200_000, "[" * 100_000 + "]" * 100_000])
def test_a_line_that_is_nested_deeply_is_named(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n' + line)
    with pytest.raises(InputError, match=r"rows.jsonl, line 2 is nested too deeply"):
        read_sources([str(tmp_path)])


@pytest.mark.parametrize("line", [b"\xff\xfe", b'{"text": "\xff"}', b"nothing", b"\0", b'"text"', b"NaN"])
def test_a_line_that_holds_no_row_is_named(tmp_path, line):
    (tmp_path / "rows.jsonl").write_bytes(line)
    with pytest.raises(InputError, match=r"rows.jsonl, line 1 (is not JSON|has no field)"):
        read_sources([str(tmp_path)])


def test_parquet_text_need_not_be_utf8(tmp_path):
    column = pyarrow.array([b"\xff\xfe", b"a"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "rows.parquet")
    assert joined(read_sources([str(tmp_path)])) == b"\xff\xfea"
    for kind in (
        pyarrow.large_string(),
        pyarrow.binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ):
        table = pyarrow.table({"text": pyarrow.array(TEXTS).cast(kind)})
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", compression="zstd")
        assert [document.data.decode() for document in read_sources([str(tmp_path)])] == TEXTS


def test_damaged_files_of_rows_are_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "tw')
    with pytest.raises(InputError, match=r"rows.jsonl, line 2 is not JSON"):
        read_sources([str(tmp_path / "rows.jsonl")])
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"rows.parquet is not parquet"):
        read_sources([str(tmp_path / "rows.parquet")])


def test_a_dataset_is_streamed_once_and_again_when_its_folder_changed(tmp_path):
    write_json_lines(tmp_path / "data.jsonl")
    source = f"hf://{tmp_path}"
    assert [document.data.decode() for document in read_sources([source])] == TEXTS
    [kept] = find_files([source])
    written = kept.version()
    assert find_files([source])[0].version() == written
    (tmp_path / "data.jsonl").write_text('{"text": "new"}\n')
    assert [document.data for document in read_sources([source])] == [b"new"]
    kept.path.write_bytes(bytes(kept.size))
    write_json_lines(tmp_path / "data.jsonl")
    assert [document.data.decode() for document in read_sources([source])] == TEXTS
    with pytest.raises(InputError, match=r"cannot read hf:///nowhere: "):
        read_sources(["hf:///nowhere"])


@pytest.mark.parametrize("rows", [1, 100, 60_000])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.txt"])
def test_all_bytes_of_a_file_are_reported_as_progress(tmp_path, rows, name):
    data = b"".join(b'{"text": "row %d"}\n' % row for row in range(rows))
    path = tmp_path / name
    path.write_bytes(gzip.compress(data, 0) if name.endswith("gz") else data)
    read = []
    (file,) = find_files([str(path)])
    for _, chunks in file.documents("text", read.append):
        list(chunks)
    assert sum(read) == path.stat().st_size
