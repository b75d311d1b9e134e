"""Several processes as `torchrun` starts them, against one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call_in_processes, run_processes
from safetensors.torch import load_file

import mhesa
from mhesa.data.corpus import Source, open_corpus
from mhesa.data.windows import Windows
from mhesa.errors import InputError
from mhesa.inference.evaluation import evaluate
from mhesa.model.config import ModelConfig
from mhesa.processes import all_or_none, check_same, join_processes, rank
from mhesa.training import run as run_module
from mhesa.training.batches import Batches
from mhesa.training.checkpoint import newest, remedy
from mhesa.training.distributed import Grid, distribute, is_sharded, model_state
from mhesa.training.run import train
from mhesa.training.settings import TrainingSettings

OPTIONS = {
    "steps": 15,
    "save_every": 5,
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
def run_of_one_process(tmp_path_factory):
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


def back_to_step_5(run, to):
    """A copy of a run that died after its first checkpoint."""
    shutil.copytree(run, to)
    for step in (10, 15):
        shutil.rmtree(to / "checkpoints" / f"step-{step}")
    return to


@pytest.fixture(scope="module")
def run_of_two_processes(run_of_one_process, tmp_path_factory):
    """The same run by two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    done = torchrun(2, *run_of_one_process.sources, "--out", out, "--carry-state", *options)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    assert done.stdout.count("held-out text") == 1
    return out


def test_two_processes_train_the_same_model(run_of_one_process, run_of_two_processes):
    assert_same_curve(run_of_two_processes, losses(Path(run_of_one_process.out)))


def test_one_process_resumes_a_run_of_two(run_of_one_process, run_of_two_processes, tmp_path):
    out = back_to_step_5(run_of_two_processes, tmp_path / "run")
    train(replace(run_of_one_process, out=str(out)), resume=True)
    assert_same_curve(out, losses(run_of_two_processes))


@pytest.mark.parametrize(("processes", "options"), [(4, []), (2, ["--fsdp"])], ids=["4", "2, sharded"])
def test_other_groups_resume_a_run_of_two(run_of_two_processes, tmp_path, processes, options):
    out = back_to_step_5(run_of_two_processes, tmp_path / "run")
    done = run_processes(processes, "train", "--resume", "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert_same_curve(out, losses(run_of_two_processes))
    weights, expected = (load_file(folder / "model.safetensors") for folder in (out, run_of_two_processes))
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(weights[name], expected[name], atol=1e-4) for name in expected)


@pytest.fixture(scope="module")
def shared(run_of_one_process, tmp_path_factory):
    """The same run by two processes that share every window, whose context they do not divide."""
    out = tmp_path_factory.mktemp("shared") / "run"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    arguments = (*run_of_one_process.sources, "--out", out, "--carry-state", *options, "--context", 33)
    done = run_processes(2, "train", *arguments, "--context-parallel", 2, "--eval-every", 15)
    assert done.returncode == 0, done.stderr
    assert "2 processes, 2 to a window" in done.stderr
    return out


@pytest.fixture(scope="module")
def alone(run_of_one_process, tmp_path_factory):
    """The run of `shared` by one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(replace(run_of_one_process, out=str(out), context=33, eval_every=15))
    return out


def held_out(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["held_out_bits_per_byte"] for row in rows if "held_out_bits_per_byte" in row]


def test_processes_that_share_windows_train_the_same_model(alone, shared):
    assert_same_curve(shared, losses(alone))
    assert len(held_out(shared)) == 2
    assert held_out(shared) == pytest.approx(held_out(alone), abs=1e-4)


@pytest.mark.parametrize(
    ("processes", "columns", "options"),
    [(4, 2, []), (4, 4, ["--fsdp"]), (1, 1, [])],
    ids=["2 x 2", "4, sharded", "1"],
)
def test_other_groups_resume_a_run_of_shared_windows(shared, tmp_path, processes, columns, options):
    out = back_to_step_5(shared, tmp_path / "run")
    resume = ["train", "--resume", "--out", out, "--context-parallel", columns, *options]
    done = run_processes(processes, *resume)
    assert done.returncode == 0, done.stderr
    assert_same_curve(out, losses(shared))
    assert held_out(out) == pytest.approx(held_out(shared), abs=1e-4)


def shard(folder):
    """What each of two processes does: share out a model's weights, and gather them again."""
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
    (folder / f"held-{rank()}").write_text(f"{held} {total}")


def test_sharded_weights_are_held_once(tmp_path):
    call_in_processes(2, shard, tmp_path)
    (first, whole), (second, _) = [
        [int(number) for number in (tmp_path / f"held-{rank}").read_text().split()] for rank in (0, 1)
    ]
    assert first + second == whole


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_window_is_read_twice_and_none_is_left_out(processes, accumulate):
    windows = Windows(np.arange(1000), context=10, rows=8, seed=0)
    read = []
    for row in range(processes):
        grid = Grid(rows=processes, row=row)
        micro_batches = Batches(windows, accumulate=accumulate, eos_token_id=None, grid=grid).read(3)
        assert len(micro_batches) == accumulate
        for batch in micro_batches:
            read += batch.ids[:, 0].tolist()
    assert sorted(read) == sorted(windows.starts(3).tolist())


def test_a_batch_that_cannot_be_shared_is_refused(run_of_one_process, tmp_path):
    done = run_processes(
        2, "train", *run_of_one_process.sources, "--out", tmp_path / "run", "--batch-size", 3
    )
    assert done.returncode == 2
    assert "batch_size 3 cannot be divided into 1 micro-batches for 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


def test_windows_that_cannot_be_shared_are_refused(run_of_one_process, tmp_path):
    done = run_processes(
        2, "train", *run_of_one_process.sources, "--out", tmp_path / "run", "--context-parallel", 3
    )
    assert done.returncode == 2
    assert "context_parallel 3 does not divide the number of processes, 2" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_parallel": 2}, "context_parallel 2 does not divide the number of processes, 1"),
        ({"context_parallel": 33}, "context 32 is shorter than context_parallel 33"),
        ({"context_parallel": 2, "compile": True}, "compile cannot be used with context_parallel"),
    ],
)
def test_invalid_settings_are_refused(run_of_one_process, changes, message):
    with pytest.raises(InputError, match=message):
        replace(run_of_one_process, **changes).resolve()


@pytest.mark.parametrize("options", [("--context-parallel", 2), ()], ids=["shared windows", "DDP"])
def test_a_process_that_dies_ends_the_others(run_of_one_process, tmp_path, options):
    out = tmp_path / "run"

    def kill_the_second(processes):
        while processes[1].is_alive() and not list((out / "checkpoints").glob("step-*")):
            time.sleep(0.05)
        os.kill(processes[1].pid, signal.SIGKILL)

    sizes = ("--dim", 16, "--depth", 1, "--dim-mhesa", 32, "--save-every", 1, "--steps", 10**6)
    arguments = ("train", *run_of_one_process.sources, "--out", out, *sizes, *options)
    done = run_processes(2, *arguments, meanwhile=kill_the_second)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert "another process ended or does not answer" in line
    assert newest(out / "checkpoints")[1] == []


@pytest.mark.parametrize(
    "command", [("eval", "--json"), ("score", "--top", 3, "--json")], ids=["eval", "score"]
)
def test_processes_read_a_text_together(shared, run_of_one_process, tmp_path, run, command):
    text = tmp_path / "text.txt"
    text.write_bytes(Path(*run_of_one_process.sources).read_bytes()[:20_001])
    name, *options = command
    code, expected, _ = run(name, shared, text, *options)
    done = run_processes(3, name, shared, text, *options)
    assert (code, done.returncode) == (0, 0), done.stderr
    for mine, theirs in zip(expected.decode().splitlines(), done.stdout.splitlines(), strict=True):
        mine, theirs = json.loads(mine), json.loads(theirs)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert theirs[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4))


def test_processes_cannot_score_standard_input(shared):
    done = run_processes(2, "score", shared)
    assert done.returncode == 2
    assert "many processes cannot share standard input" in done.stderr


@pytest.mark.parametrize(("size", "said"), [("x", "invalid literal"), ("2", "MASTER_ADDR expected")])
def test_variables_of_no_start_of_processes_are_one_line(size, said, tmp_path):
    (tmp_path / "text").write_text("a line\n" * 1000)
    command = [
        sys.executable,
        "-m",
        "mhesa",
        "train",
        tmp_path / "text",
        "--out",
        tmp_path / "run",
        "--steps",
        "1",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    environment |= {"WORLD_SIZE": size, "RANK": "0", "LOCAL_RANK": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    assert "start with torchrun, or unset it" in done.stderr


def measure_in_processes(settings, folder):
    """Long texts are shared, short ones dealt out: the cost is that of one process."""
    run_module.SHARED_BYTES = 200
    train(replace(settings, out=f"{folder}/run"))
    if os.environ["RANK"] == "0":
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        model, tokenizer = mhesa.load(f"{folder}/run")
        source = Source(settings.sources, holdout=settings.holdout)
        expected = evaluate(model, tokenizer, open_corpus(source, tokenizer).held_out)
        assert rows[-1]["held_out_loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert rows[-1]["held_out_tokens"] == expected.tokens


def test_measuring_is_dealt_out_and_shared(tmp_path):
    texts = tmp_path / "texts.jsonl"
    lengths = [*range(1, 40), 500, 900] * 9
    texts.write_text("".join(json.dumps({"text": "some words " * n}) + "\n" for n in lengths))
    settings = TrainingSettings(out="run", sources=(str(texts),), holdout="tail:0.4", **OPTIONS)
    call_in_processes(2, measure_in_processes, settings, str(tmp_path))


def refuse_in_one():
    with all_or_none():
        if rank() == 1:
            raise InputError("only here")


def refuse_other_facts():
    join_processes("cpu")
    with pytest.raises(InputError, match="process 1 has text 1, and process 0 0; start all alike"):
        check_same({"size": 7, "text": rank()})
    with pytest.raises(InputError, match="only here"):
        refuse_in_one()
    check_same({"size": 7})


def test_what_one_process_refuses_all_refuse():
    call_in_processes(2, refuse_other_facts)


def refuse_what_differs(out, text, other):
    """One of two processes has something else, or no text: both refuse, and nothing is written."""
    settings = TrainingSettings(out=out, sources=(text,), **OPTIONS)
    ways = {
        "process 1 has lr 0.5, and process 0": {"lr": 0.5},
        "process 1 has steps 16, and process 0 15": {"steps": 16},
        "process 1 has text": {"sources": (other,)},
        "backend 'fft' cannot serve": {"backend": "fft"},
        "no such file, folder or pattern: nowhere.txt": {"sources": ("nowhere.txt",)},
    }
    for message, changes in ways.items():
        mine = replace(settings, **changes) if os.environ["RANK"] == "1" else settings
        with pytest.raises(InputError, match=message):
            train(mine, overwrite=True)
    with pytest.raises(InputError, match="already holds a run"):
        train(settings)


def test_processes_that_were_started_otherwise_replace_no_run(run_of_one_process, tmp_path):
    shutil.copytree(run_of_one_process.out, tmp_path / "run")
    (tmp_path / "other.txt").write_text("another text\n" * 9000)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (text,) = run_of_one_process.sources
    arguments = str(tmp_path / "run"), text, str(tmp_path / "other.txt")
    call_in_processes(2, refuse_what_differs, *arguments)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_without_a_checkpoint_nobody_is_told_to_resume(tmp_path):
    folder = tmp_path / "checkpoints"
    assert "start over with --overwrite" in remedy(folder)
    (folder / "step-5").mkdir(parents=True)
    assert "--resume goes on from the newest" in remedy(folder)
