"""Short runs of training, what they leave, and how two are compared."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mhesa.training.settings import TrainingSettings

TINY = {
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "dim_mhesa": 8,
    "context": 32,
    "batch_size": 4,
    "precision": "fp32",
}
TEXT = "".join(f"line {index} of a text, {index * index}\n" for index in range(3000))


def small_run(folder):
    """Settings of a run of three steps, with its text and its folder below the one given."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    return TrainingSettings(out=str(folder / "run"), sources=(str(text),), steps=3, **TINY)


def weights(run):
    return load_file(Path(run.out) / "model.safetensors")


def rows(run):
    return [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]


def figures(run):
    """The rows without what a clock says."""
    timed = ("seconds", "tokens_per_second")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows(run)]


def optimizer(run, step):
    return load_file(Path(run.out) / "checkpoints" / f"step-{step}" / "optimizer.safetensors")


def assert_same_run(one, other, step):
    """Weights, optimizer and every figure, bit for bit."""
    for mine, theirs in ((weights(one), weights(other)), (optimizer(one, step), optimizer(other, step))):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert figures(one) == figures(other)


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)
