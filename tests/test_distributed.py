"""Several processes as `torchrun` starts them, against one."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_processes
from safetensors.torch import load_file

from mhesa.data import Windows
from mhesa.training import TrainingSettings, batches, train
from mhesa.training.batches import Batches

OPTIONS = {
    "steps": 30,
    "save_every": 10,
    "keep": 3,
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "dim_mhesa": 8,
    "context": 32,
    "batch_size": 8,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process, with states that are carried."""
    folder = tmp_path_factory.mktemp("one")
    text = folder / "text.txt"
    text.write_text("".join(f"line {index} of a text, {index * index}\n" for index in range(3000)))
    settings = TrainingSettings(out=str(folder / "run"), sources=(str(text),), carry_state=True, **OPTIONS)
    train(settings)
    return settings


def torchrun(processes, *arguments):
    """Run the command in several processes, started as users do."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
            *("--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *("-m", "mhesa", "train", *map(str, arguments)),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=250,
    )


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def assert_same_curve(folder, expected):
    found = losses(folder)
    assert found.keys() == expected.keys()
    assert all(found[step] == pytest.approx(expected[step], abs=1e-4) for step in expected)


def back_to_step_10(run, to):
    """A copy of a run that died after its first checkpoint."""
    shutil.copytree(run, to)
    for step in (20, 30):
        shutil.rmtree(to / "checkpoints" / f"step-{step}")
    return to


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    """The run of `one` by two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    done = torchrun(2, *one.sources, "--out", out, "--carry-state", *options)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    assert done.stdout.count("held-out text") == 1
    return out


def test_two_processes_are_one(one, two):
    assert_same_curve(two, losses(Path(one.out)))


def test_what_two_saved_one_resumes(one, two, tmp_path):
    out = back_to_step_10(two, tmp_path / "run")
    train(replace(one, out=str(out)), resume=True)
    assert_same_curve(out, losses(two))


@pytest.mark.parametrize(("processes", "options"), [(4, []), (2, ["--fsdp"])], ids=["4", "2, sharded"])
def test_what_two_saved_others_resume(two, tmp_path, processes, options):
    out = back_to_step_10(two, tmp_path / "run")
    done = run_processes(processes, "train", "--resume", "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert_same_curve(out, losses(two))
    weights, expected = (load_file(folder / "model.safetensors") for folder in (out, two))
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(weights[name], expected[name], atol=1e-4) for name in expected)


SHARDED = """
from mhesa.model.config import ModelConfig
from mhesa.training.distributed import distribute, is_sharded, join_processes, model_state, rank
import torch
join_processes("cpu")
torch.manual_seed(0)
model = ModelConfig(dim=16, depth=2, heads=2, dim_mhesa=8).build()
whole = {name: value.clone() for name, value in model.state_dict().items()}
total = sum(p.numel() for p in model.parameters())
distribute(model, "cpu", fsdp=True)
assert is_sharded(model)
held = sum(p.to_local().numel() for p in model.parameters())
assert abs(held - total / 2) <= 2 * len(list(model.parameters())) * 16
gathered = model_state(model)
assert gathered.keys() == (whole.keys() if rank() == 0 else set())
if rank() == 0:
    assert all(torch.equal(gathered[name], value) for name, value in whole.items())
print("held", held, "of", total)
"""


def test_sharded_weights_are_held_once(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(tmp_path / "sharded.py")]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=100, env=environment)
    assert done.stdout.count("held ") == 2, done.stderr


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_window_is_read_twice_and_none_is_left_out(monkeypatch, processes, accumulate):
    windows = Windows(np.arange(1000), context=10, rows=8, seed=0)
    monkeypatch.setattr(batches, "processes", lambda: processes)
    read = []
    for rank in range(processes):
        monkeypatch.setattr(batches, "rank", lambda rank=rank: rank)
        micro_batches = Batches(windows, accumulate=accumulate, eos_token_id=None).read(3)
        assert len(micro_batches) == accumulate
        for batch in micro_batches:
            read += batch.ids[:, 0].tolist()
    assert sorted(read) == sorted(windows.starts(3).tolist())


def test_a_batch_that_cannot_be_shared_is_refused(one, tmp_path):
    done = run_processes(2, "train", *one.sources, "--out", tmp_path / "run", "--batch-size", 3)
    assert done.returncode == 2
    assert "batch_size 3 cannot be divided into 1 micro-batches for 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()
