"""The model in the repository: small, and good at what it was trained for."""

import argparse
import lzma
from pathlib import Path

import pytest

from mhesa import Reader, Session, load
from mhesa.data.files import Document
from mhesa.inference.decoder import Decoder
from mhesa.inference.evaluation import evaluate

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "models" / "python"
CODE = Path(argparse.__file__).read_bytes()


@pytest.fixture(scope="module")
def model():
    return load(FOLDER)


def bits_per_byte(decoder, tokenizer, data):
    return evaluate(decoder, tokenizer, [Document("code", data)]).bits_per_byte


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 3_000_000


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_it_predicts_the_standard_library_better_than_xz_does(model, quantize):
    found = bits_per_byte(Decoder(model[0], quantize=quantize), model[1], CODE)
    assert found < 8 * len(lzma.compress(CODE, preset=9)) / len(CODE)


def test_eight_bits_cost_little(model):
    decoders = [Decoder(model[0]), Decoder(model[0], quantize="int8")]
    exact, quantized = (bits_per_byte(decoder, model[1], CODE[:20_000]) for decoder in decoders)
    assert quantized < 1.005 * exact


def test_a_mistake_surprises_it(model):
    def bits(text):
        return Session(Reader(*model)).score(text).sum()

    line = "def read(path):\n    with open(path) as file:\n        return file.read()\n"
    assert bits(line) + 5 < bits(line.replace("return", "retxrn"))
    assert bits(line) + 5 < bits(line.replace("file.read", "fxle.read"))


def test_its_text_is_python(model):
    session = Session(Reader(*model))
    session.feed("class Reader:\n    def __init__(self, path):\n        self.path = ")
    text = session.generate(max_new_tokens=1, seed=0)
    assert text == "p"
