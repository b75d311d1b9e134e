"""Settings, schedule and the parts of a run that the command line's tests do not reach."""

import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import mhesa
from mhesa.data import Source, Windows, open_corpus
from mhesa.errors import InputError, TrainingError
from mhesa.hf import ByteTokenizer, MhesaForCausalLM
from mhesa.model.loading import saved_name
from mhesa.training import Stopped, TrainingSettings, train
from mhesa.training.checkpoint import Progress, newest, save, steps
from mhesa.training.optimizers import decay_groups
from mhesa.training.plot import draw_curve
from mhesa.training.schedule import Budget, learning_rate

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


@pytest.fixture
def settings(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return TrainingSettings(out=str(tmp_path / "run"), sources=(str(text),), steps=3, **TINY)


def test_the_schedule_has_no_jumps():
    rates = np.array([learning_rate(spent, 0.1) for spent in np.linspace(0, 1, 10_001)])
    assert rates.max() == 1
    assert rates[-1] == pytest.approx(0.1)
    assert rates[1000] == 1
    assert np.abs(np.diff(rates)).max() < 0.011
    assert (np.diff(rates[1000:]) < 0).all()
    assert learning_rate(0.0, 0.0) == 1
    assert learning_rate(2.0, 0.1) == pytest.approx(0.1)


def test_a_time_allows_the_steps_of_its_speed():
    assert Budget(steps=300, minutes=None).expected_steps(20, 1.0) == 300
    budget = Budget(steps=None, minutes=2)
    budget.set(60.0)
    assert budget.expected_steps(20, 0.5) == 20 + 120


def test_only_matrices_decay():
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "emb": nn.Embedding(3, 2)})
    decayed, plain = decay_groups(list(model.parameters()), 0.1)
    assert [decayed["weight_decay"], plain["weight_decay"]] == [0.1, 0.0]
    assert decayed["params"] == [model["linear"].weight, model["emb"].weight]
    assert plain["params"] == [model["linear"].bias, model["norm"].weight, model["norm"].bias]


def test_settings_survive_a_file(settings, tmp_path):
    resolved = settings.resolve()
    resolved.save(tmp_path / "settings.json", corpus={"bytes": 1})
    assert TrainingSettings.load(tmp_path / "settings.json") == resolved
    assert json.loads((tmp_path / "settings.json").read_text())["corpus"] == {"bytes": 1}


@pytest.mark.parametrize("text", ["", "[]", '{"settings": 3}', '{"settings": {"sources": [], "colour": 1}}'])
def test_settings_of_something_else_are_refused(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(InputError, match=r"settings\.json"):
        TrainingSettings.load(tmp_path / "settings.json")
    with pytest.raises(InputError, match="holds no training run: it has no"):
        TrainingSettings.load(tmp_path / "nowhere" / "settings.json")


def test_automatic_choices_keep_to_what_was_asked(settings):
    auto = replace(settings, batch_size=None, steps=None, precision="auto").resolve()
    assert auto.windows_a_step * auto.context >= 1024
    assert auto.minutes == 3
    assert auto.precision in ("bf16", "fp32")
    assert settings.resolve().batch_size == 4
    assert settings.resolve().minutes is None


def test_every_process_gets_as_much_as_one_alone(settings, monkeypatch):
    auto = replace(settings, batch_size=None, accumulate=3)
    alone = auto.resolve().windows_a_step
    monkeypatch.setattr("mhesa.processes.processes", lambda: 4)
    assert auto.resolve().windows_a_step == 4 * alone
    assert replace(auto, batch_size=24).resolve().windows_a_step == 24


def test_a_run_from_python(settings):
    summary = train(settings)
    assert summary.steps == 3
    assert summary.score.bytes > 0
    assert {"model.safetensors", "loss.png"} <= set(summary.files)
    with pytest.raises(InputError, match="already holds a run"):
        train(settings)
    more = train(replace(settings, steps=5), resume=True)
    assert more.steps == 5


@pytest.mark.parametrize(("steps", "probability"), [(20, 0.0), (40, 0.1)], ids=["4 times", "8 times"])
def test_dropout_follows_how_often_the_text_is_read(settings, tmp_path, steps, probability):
    text = tmp_path / "short.txt"
    text.write_text(TEXT[:800])
    automatic = replace(settings, sources=(str(text),), holdout="tail:0.2", steps=steps)
    given = replace(automatic, out=str(tmp_path / "given"), dropout=probability)
    other = replace(automatic, out=str(tmp_path / "other"), dropout=0.1 - probability)
    for run in (automatic, given, other):
        train(run)
    assert_same_run(automatic, given, steps)
    assert not all(torch.equal(value, weights(other)[name]) for name, value in weights(automatic).items())
    assert {row["dropout"] for row in rows(automatic) if "loss" in row} == {probability}
    # What is not given is no property of the model.
    for run, saved in ((automatic, 0.0), (given, probability)):
        assert json.loads((Path(run.out) / "config.json").read_text())["dropout"] == saved


def test_a_time_decides_about_dropout_once_the_speed_is_known(settings, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text(TEXT[:400])
    # What is compiled at first is not to take of the time.
    train(replace(settings, out=str(tmp_path / "first")))
    timed = replace(settings, sources=(str(text),), holdout="tail:0.2", steps=None, minutes=0.05)
    train(timed)
    chosen = {row["step"]: row["dropout"] for row in rows(timed) if "loss" in row}
    assert {dropout for step, dropout in chosen.items() if step <= 20} == {0.0}
    # So small a model reads so short a text more than 25 times in three seconds.
    assert {dropout for step, dropout in chosen.items() if step > 20} == {0.5}


def test_a_loss_that_is_no_number_ends_the_run(settings):
    with pytest.raises(TrainingError, match=r"the (loss|gradient) became .* at step .*learning rate"):
        train(replace(settings, lr=1e30, steps=50))


def test_another_corpus_does_not_resume_a_run(settings):
    train(settings)
    with open(settings.sources[0], "a") as file:
        file.write("one more line\n")
    with pytest.raises(InputError, match="the text is not the one"):
        train(replace(settings, steps=5), resume=True)


def test_progress_reaches_a_terminal(settings, tmp_path):
    with (tmp_path / "screen").open("w") as file:
        train(settings, console=Console(file=file, force_terminal=True, width=150))
    screen = (tmp_path / "screen").read_text()
    assert "tokens/s" in screen
    assert "bits/byte" in screen
    assert "100%" in screen


# Exact resume


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


OLD_RUN = Path(__file__).parent / "data" / "run_with_transformers"


def test_a_run_of_the_trainer_of_transformers_goes_on(tmp_path, monkeypatch):
    """A run of 20 steps that transformers' Trainer made, taken up again at step 10."""
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


def test_a_run_without_a_whole_checkpoint_is_not_touched(settings):
    train(settings)
    flip(Path(settings.out) / "checkpoints" / "step-3" / "model.safetensors")
    before = {path: path.read_bytes() for path in Path(settings.out).rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"no whole checkpoint.*step-3/model.safetensors is damaged"):
        train(replace(settings, steps=5), resume=True)
    assert {path: path.read_bytes() for path in Path(settings.out).rglob("*") if path.is_file()} == before


def test_what_a_dead_process_left_is_no_checkpoint(tmp_path):
    (tmp_path / ".step-9.partial").mkdir()
    assert newest(tmp_path) == (None, [])
    save(tmp_path, Progress(step=9), {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-9"]


def test_the_best_checkpoint_is_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, Progress(step=step, best_step=2), {}, keep=2)
    assert steps(tmp_path) == [5, 4, 2]


def test_early_stopping_takes_the_best(settings):
    run = replace(settings, steps=400, eval_every=5, patience=3, lr=0.3, warmup=0.5)
    summary = train(run)
    evaluations = [row for row in rows(run) if "sample" in row]
    best = min(evaluations, key=lambda row: row["held_out_bits_per_byte"])
    assert summary.steps == best["step"] + 15 < 400
    saved = load_file(Path(run.out) / "checkpoints" / f"step-{best['step']}" / "model.safetensors")
    assert all(torch.equal(weights(run)[name], value) for name, value in saved.items())
    assert summary.score.bits_per_byte == pytest.approx(best["held_out_bits_per_byte"])


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
    assert rows(run)[-1]["complete"]
    with pytest.raises(InputError, match="complete at step 6; give it more with --steps or --minutes"):
        train(run, resume=True)


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_may_begin_where_the_best_model_was_not_saved(settings, patience):
    # The rates rise so far that later evaluations are worse than the first.
    rates = {"lr": 1.0, "muon_lr": 1.0, "warmup": 0.9}
    run = replace(settings, steps=12, save_every=8, eval_every=2, **rates)
    train(replace(run, steps=8))
    assert json.loads((Path(run.out) / "checkpoints/step-8/progress.json").read_text())["best_step"] < 8
    resumed = replace(run, patience=patience)
    summary = train(resumed, resume=True)
    evaluations = [row for row in rows(run) if "sample" in row and row["step"] > 8]
    best = min(evaluations, key=lambda row: row["held_out_bits_per_byte"])
    assert summary.score.bits_per_byte == pytest.approx(best["held_out_bits_per_byte"])
    if summary.steps < 12:
        with pytest.raises(
            InputError, match=f"complete at step {summary.steps}; give it more with --patience"
        ):
            train(resumed, resume=True)


@pytest.mark.parametrize(("optimizer", "error"), [("adamw", 1e-5), ("muon", 1e-4)])
def test_accumulation_is_the_same_step(settings, tmp_path, optimizer, error):
    whole = replace(settings, steps=20, optimizer=optimizer)
    parted = replace(whole, accumulate=4, out=str(tmp_path / "parted"))
    train(whole)
    train(parted)
    for one, other in zip(rows(whole), rows(parted), strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(other["loss"], abs=error)


def test_a_carried_state_is_the_state_of_the_whole_stream(settings):
    """Windows with states handed on are one long window, as far as the loss can tell."""
    text = Path(settings.sources[0])
    stream = replace(
        settings,
        carry_state=True,
        join=True,
        batch_size=1,
        lr=1e-30,
        muon_lr=1e-30,
        steps=10,
        weight_decay=0.0,
    )
    train(stream)
    losses = [row["loss"] for row in rows(stream) if "loss" in row]
    tokens = open_corpus(Source([str(text)]), ByteTokenizer()).tokens
    windows = Windows(tokens, context=320, rows=1, seed=0, streams=True)
    begin = Windows(tokens, context=32, rows=1, seed=0, streams=True).starts(0)
    ids = windows.read(begin)
    model = MhesaForCausalLM.from_pretrained(stream.out)
    with torch.no_grad():
        expected = model.to_plain()(ids[:, :-1], labels=ids[:, 1:])
    assert losses == [pytest.approx(expected.item(), abs=1e-5)]


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)


@needs_compiler
def test_a_compiled_model_learns_the_same(settings, tmp_path):
    plain = replace(settings, depth=1, carry_state=True)
    compiled = replace(plain, compile=True, out=str(tmp_path / "compiled"))
    train(plain)
    train(compiled)
    [one], [other] = ([row["loss"] for row in rows(run) if "loss" in row] for run in (plain, compiled))
    assert one == pytest.approx(other, abs=1e-5)


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


# Reports


def test_figures_reach_wandb_without_a_network(settings, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(replace(settings, steps=20, eval_every=10, report_to="wandb"))
    assert wandb.run is None
    [log] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    for name in (b"train/loss", b"train/bits_per_byte", b"train/held_out_bits_per_byte"):
        assert name in log.read_bytes()


def test_figures_reach_trackio_without_a_network(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="pip install trackio")
    train(replace(settings, steps=20, eval_every=10, report_to="trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "mhesa.db") as database:
        found = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics")]
    losses = [row["train/loss"] for row in found if "train/loss" in row]
    assert losses == [pytest.approx(row["loss"]) for row in rows(settings) if "loss" in row]
    assert any("train/held_out_bits_per_byte" in row for row in found)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_reporter_that_is_missing_is_named(settings, monkeypatch, name):
    monkeypatch.setattr("mhesa.training.settings.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"report_to {name} needs it installed: pip install {name}"):
        replace(settings, report_to=name).resolve()


def test_a_curve_is_a_picture(tmp_path):
    rows = [
        {"step": step, "loss": 1, "tokens": 1e6 * step, "bits_per_byte": 8 / step} for step in range(1, 5)
    ]
    draw_curve(rows, {"xz -9": 3.0}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
