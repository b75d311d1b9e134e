"""JSON of any content; that writes are atomic, `test_crash.py` tries."""

import pytest

from mhesa.atomic_io import read_json
from mhesa.errors import InputError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a":' * 100_000, "it is nested too deeply"),
        ("1" * 5000, "is damaged: Exceeds the limit"),
        ("{", "is damaged: Expecting"),
        ("\x00", "is damaged: "),
        ("\udcff", "is damaged: "),
    ],
    ids=["lists", "objects", "digits", "cut", "nul", "bytes"],
)
def test_json_of_any_content_is_read_or_named(tmp_path, text, message):
    path = tmp_path / "values.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nothing.json: No such file"):
        read_json(tmp_path / "nothing.json")
