"""What a run tells while it trains: progress, figures for other programs, the curve."""

import json
import sqlite3
from dataclasses import replace

import pytest
from rich.console import Console
from training_runs import rows, small_run

from mhesa.errors import InputError
from mhesa.training.plot import draw_curve
from mhesa.training.run import train


@pytest.fixture
def settings(tmp_path):
    return small_run(tmp_path)


def test_progress_reaches_a_terminal(settings, tmp_path):
    with (tmp_path / "screen").open("w") as file:
        train(settings, console=Console(file=file, force_terminal=True, width=150))
    screen = (tmp_path / "screen").read_text()
    assert "tokens/s" in screen
    assert "bits/byte" in screen
    assert "100%" in screen


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
