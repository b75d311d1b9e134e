"""Runs that go on as if they had never stopped, and the checkpoints that they go on from."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from training_runs import assert_same_run, figures, needs_compiler, small_run, weights

import mhesa
from mhesa.errors import InputError
from mhesa.model import layers
from mhesa.model.loading import saved_name
from mhesa.tokenizers import train_bpe
from mhesa.training.checkpoint import Progress, load_part, newest, save, steps
from mhesa.training.run import Stopped, train
from mhesa.training.settings import TrainingSettings


@pytest.fixture
def settings(tmp_path):
    return small_run(tmp_path)


def interrupt_at(run, step):
    """Send this process SIGTERM once the run's metrics have come as far as `step`."""
    path = Path(run.out) / "metrics.jsonl"

    def watch():
        while not path.exists() or f'"step": {step},' not in path.read_text():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


WAYS = {
    "plain": {},
    "joined": {"join": True},
    "dropout": {"dropout": 0.2},
    "accumulated": {"accumulate": 2, "dropout": 0.1},
    "carried": {"carry_state": True},
    "carried, joined, accumulated": {"carry_state": True, "join": True, "accumulate": 2},
    "bpe, wsd": {"tokenizer": "bpe:300", "schedule": "wsd"},
    "bf16, recomputed": {"precision": "bf16", "recompute": True, "dropout": 0.1},
    "evaluated": {"eval_every": 7, "patience": 50},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_run_goes_on_as_if_it_had_never_stopped(settings, tmp_path, way):
    whole = replace(settings, steps=40, save_every=7, **way)
    stopped = replace(whole, out=str(tmp_path / "stopped"))
    train(whole)
    interrupt_at(stopped, 10)
    with pytest.raises(Stopped) as caught:
        train(stopped)
    assert 10 <= caught.value.step < 40
    interrupt_at(stopped, 20)
    with pytest.raises(Stopped):
        train(stopped, resume=True)
    train(stopped, resume=True)
    assert_same_run(stopped, whole, 40)


def test_an_older_checkpoint_gives_the_same_run(settings, tmp_path, capsys):
    whole = replace(settings, steps=25, save_every=6, keep=4, carry_state=True, dropout=0.1)
    torn = replace(whole, out=str(tmp_path / "torn"))
    train(whole)
    shutil.copytree(whole.out, torn.out)
    folder = Path(torn.out) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-12", "step-18", "step-24", "step-25"]
    flip(folder / "step-25" / "model.safetensors")
    truncate(folder / "step-24" / "optimizer.safetensors")
    (folder / "step-18" / "manifest.json").unlink()
    train(torn, resume=True, console=Console(width=200))
    said = capsys.readouterr().out
    assert "step-25/model.safetensors is damaged; going on from step-12 instead" in said
    assert "step-24/optimizer.safetensors is damaged" in said
    assert "step-18/manifest.json is damaged" in said
    assert_same_run(torn, whole, 25)


def test_a_run_goes_on_where_its_device_and_its_tokenizer_are_not(settings, tmp_path):
    train_bpe([b"a text of words and numbers"] * 9, 300).save_pretrained(tmp_path / "words")
    run = replace(settings, steps=3, tokenizer=str(tmp_path / "words"))
    train(run)
    shutil.rmtree(tmp_path / "words")
    path = Path(run.out) / "settings.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    changes = {"out": run.out, "device": "cpu", "steps": 5}
    train(TrainingSettings.resumed(changes), resume=True)
    assert figures(run)[-1]["step"] == 5
    with pytest.raises(InputError, match="tokenizer must be bytes, bpe:N, or a folder"):
        train(run, overwrite=True)


OLD_RUN = Path(__file__).parent / "data" / "run_with_transformers"


def test_a_run_of_the_trainer_of_transformers_goes_on(tmp_path, monkeypatch):
    """A run of 20 steps that transformers' Trainer made, taken up again at step 10."""
    # Its masks were those of PyTorch's dropout.
    monkeypatch.setattr(layers, "Dropout", lambda p, backend: torch.nn.Dropout(p))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD_RUN, "run")
    Path("text.txt").write_text(
        "".join(f"line {index} of a text, {index * index}\n" for index in range(3000))
    )
    run = TrainingSettings.load(Path("run/settings.json"))
    expected = figures(run)
    model, _ = mhesa.load("run")
    finished = weights(run)
    assert all(torch.equal(finished[saved_name(name)], value) for name, value in model.state_dict().items())
    train(run, resume=True)
    for mine, theirs in zip(figures(run), expected, strict=True):
        # The row of step 10 is the old one.
        if "loss" in mine and mine["step"] > 10:
            assert mine.pop("dropout") == 0.1
        assert mine == pytest.approx(theirs, rel=1e-5)
    found = weights(run)
    assert found.keys() == finished.keys()
    for name, value in finished.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


PARTS = ["manifest.json", "model.safetensors", "optimizer.safetensors", "progress.json"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flipped", "cut", "missing"])
def test_no_part_of_a_checkpoint_can_be_damaged_unseen(tmp_path, name, damage):
    save(tmp_path, Progress(step=3), {"model": {"w": torch.ones(9)}, "optimizer": {}}, keep=2)
    assert newest(tmp_path) == (tmp_path / "step-3", [])
    damage(tmp_path / "step-3" / name)
    path, passed_over = newest(tmp_path)
    assert path is None
    assert len(passed_over) == 1
    assert "is damaged" in passed_over[0]
    # A manifest that was changed blames what it is wrong about.
    assert name in passed_over[0] or (damage is flip and name == "manifest.json")


def test_a_part_that_is_missing_is_no_empty_one(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*model.safetensors: No such file"):
        load_part(tmp_path, "model")


def test_a_run_without_a_whole_checkpoint_is_not_touched(settings):
    train(settings)
    flip(Path(settings.out) / "checkpoints" / "step-3" / "model.safetensors")
    before = {path: path.read_bytes() for path in Path(settings.out).rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"no whole checkpoint.*step-3/model.safetensors is damaged"):
        train(replace(settings, steps=5), resume=True)
    assert {path: path.read_bytes() for path in Path(settings.out).rglob("*") if path.is_file()} == before


def test_a_partial_folder_is_no_checkpoint(tmp_path):
    (tmp_path / ".step-9.partial").mkdir()
    assert newest(tmp_path) == (None, [])
    save(tmp_path, Progress(step=9), {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-9"]


def test_the_best_checkpoint_is_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, Progress(step=step, best_step=2), {}, keep=2)
    assert steps(tmp_path) == [5, 4, 2]


@needs_compiler
@pytest.mark.torture
@pytest.mark.timeout(1000)
def test_a_compiled_run_goes_on_as_if_it_had_never_stopped(settings, tmp_path):
    whole = replace(settings, steps=20, save_every=10, carry_state=True, compile=True)
    again = replace(whole, out=str(tmp_path / "again"))
    train(whole)
    shutil.copytree(whole.out, again.out)
    shutil.rmtree(Path(again.out) / "checkpoints" / "step-20")
    train(again, resume=True)
    assert_same_run(again, whole, 20)


def test_a_run_that_died_before_its_model_was_saved_is_resumed(settings):
    run = replace(settings, steps=6, save_every=3)
    expected = train(run)
    saved = weights(run)
    out = Path(run.out)
    (out / "model.safetensors").unlink()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]))
    found = train(run, resume=True)
    assert (found.steps, found.score, found.sample) == (6, expected.score, expected.sample)
    assert all(torch.equal(weights(run)[name], value) for name, value in saved.items())
    assert figures(run)[-1]["complete"]
    with pytest.raises(InputError, match="complete at step 6; give it more with --steps or --minutes"):
        train(run, resume=True)
    # Nor is one whose model, or whose metrics, are gone.
    for name in ("model.safetensors", "metrics.jsonl"):
        (out / name).unlink()
        assert train(run, resume=True).score == expected.score


def test_patience_may_begin_where_the_best_model_was_not_saved(settings):
    # The rates rise so far that later evaluations are worse than the first.
    rates = {"lr": 1.0, "muon_lr": 1.0, "warmup": 0.9}
    run = replace(settings, steps=20, save_every=8, eval_every=2, **rates)
    train(replace(run, steps=8))
    assert json.loads((Path(run.out) / "checkpoints/step-8/progress.json").read_text())["best_step"] < 8
    resumed = replace(run, patience=1)
    summary = train(resumed, resume=True)
    evaluations = [row for row in figures(run) if "sample" in row and row["step"] > 8]
    best = min(evaluations, key=lambda row: row["held_out_bits_per_byte"])
    assert summary.score.bits_per_byte == pytest.approx(best["held_out_bits_per_byte"])
    assert summary.steps < 20
    with pytest.raises(InputError, match=f"complete at step {summary.steps}; give it more with --patience"):
        train(resumed, resume=True)
