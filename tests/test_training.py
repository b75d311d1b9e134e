"""Settings, schedule and the parts of a run that the command line's tests do not reach."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from torch import nn

from mhesa.errors import InputError, TrainingError
from mhesa.hf import ByteTokenizer
from mhesa.training import TrainingSettings, train
from mhesa.training.plot import draw_curve
from mhesa.training.run import load_corpus
from mhesa.training.trainer import BudgetTrainer, learning_rate

TINY = {
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "dim_mhesa": 8,
    "context": 32,
    "batch_size": 4,
    "precision": "fp32",
}


@pytest.fixture
def settings(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {index} of a text, {index * index}\n" for index in range(3000)))
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


def test_only_matrices_decay(settings):
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "emb": nn.Embedding(3, 2)})
    names = BudgetTrainer.get_decay_parameter_names(None, model)
    assert names == ["linear.weight", "emb.weight"]


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


def test_automatic_choices_keep_to_what_was_asked(settings):
    auto = replace(settings, batch_size=None, steps=None, precision="auto").resolve()
    assert auto.windows_a_step * auto.context >= 1024
    assert auto.minutes == 3
    assert auto.precision in ("bf16", "fp32")
    assert settings.resolve().batch_size == 4
    assert settings.resolve().minutes is None


def test_held_out_text_is_not_trained_on(settings):
    corpus = load_corpus(settings, ByteTokenizer())
    training = bytes(corpus.tokens[corpus.tokens < 256].astype(np.uint8))
    assert corpus.held_out
    assert all(document.data not in training for document in corpus.held_out)
    whole = sum(len(document.data) for document in corpus.held_out) + corpus.training_bytes
    assert whole == Path(settings.sources[0]).stat().st_size


def test_a_run_from_python(settings):
    summary = train(settings)
    assert summary.steps == 3
    assert summary.score.bytes > 0
    assert {"model.safetensors", "loss.png"} <= set(summary.files)
    with pytest.raises(InputError, match="already holds a run"):
        train(settings)
    more = train(replace(settings, steps=5), resume=True)
    assert more.steps == 5


def test_a_loss_that_is_no_number_ends_the_run(settings):
    with pytest.raises(TrainingError, match=r"the loss became .* at step .*; lower the learning rate"):
        train(replace(settings, lr=1e30, steps=50))


def test_another_corpus_does_not_resume_a_run(settings):
    train(settings)
    with open(settings.sources[0], "a") as file:
        file.write("one more line\n")
    with pytest.raises(InputError, match="the text is not the one"):
        train(replace(settings, steps=5), resume=True)


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_a_damaged_checkpoint_is_named(settings, name):
    train(settings)
    path = Path(settings.out) / "checkpoints" / "checkpoint-3" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = (Path(settings.out) / "settings.json").read_bytes()
    with pytest.raises(InputError, match=rf"checkpoint-3/{name} is damaged; delete"):
        train(replace(settings, steps=5), resume=True)
    assert (Path(settings.out) / "settings.json").read_bytes() == before


def test_progress_reaches_a_terminal(settings, tmp_path):
    with (tmp_path / "screen").open("w") as file:
        train(settings, console=Console(file=file, force_terminal=True, width=150))
    screen = (tmp_path / "screen").read_text()
    assert "tokens/s" in screen
    assert "bits/byte" in screen
    assert "100%" in screen


def test_a_curve_is_a_picture(tmp_path):
    rows = [{"tokens": 1e6 * step, "bits_per_byte": 8 / step} for step in range(1, 5)]
    draw_curve(rows, {"xz -9": 3.0}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
