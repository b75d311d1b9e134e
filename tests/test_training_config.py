"""Settings as YAML."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from mhesa.cli import app
from mhesa.errors import InputError
from mhesa.inference.sampling_settings import Sampling
from mhesa.model.config import ModelConfig
from mhesa.serve.settings import Limits, Settings
from mhesa.settings import settings_of
from mhesa.training.config import dump_config, load_config
from mhesa.training.settings import SETTINGS, TrainingSettings


def test_settings_come_back(tmp_path):
    settings = TrainingSettings(
        out="run", sources=("a b.txt", "é"), dim=32, lr=1e-5, join=True, patience=2, eval_every=3, minutes=2
    )
    (tmp_path / "run.yaml").write_text(dump_config(settings))
    assert TrainingSettings(**load_config(tmp_path / "run.yaml")) == settings


def test_names_are_those_of_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("out: run\nbatch-size: 4\ndim_mhesa: 64\nlr: 3e-4\nsources: one.txt\n")
    found = load_config(tmp_path / "run.yaml")
    assert found == {"out": "run", "batch_size": 4, "dim_mhesa": 64, "lr": 3e-4, "sources": ("one.txt",)}


def test_sources_of_a_damaged_run_are_not_letters(tmp_path):
    TrainingSettings(out="run", sources=("abc",)).save(tmp_path / SETTINGS, corpus={}, versions={})
    values = json.loads((tmp_path / SETTINGS).read_text())
    values["settings"]["sources"] = "abc"
    (tmp_path / SETTINGS).write_text(json.dumps(values))
    with pytest.raises(InputError, match="does not hold the settings of a training run"):
        TrainingSettings.load(tmp_path / SETTINGS)


def test_a_vocabulary_of_five_thousand_digits_is_refused():
    with pytest.raises(InputError, match="bpe:N needs N from 257"):
        TrainingSettings(out="run", tokenizer="bpe:" + "9" * 5000).vocabulary_size()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- dim", "holds no settings; write lines such as: dim: 128"),
        ("dim: [", "is not YAML"),
        ("colour: red", "names an unknown setting colour; there are accumulate, "),
        ("!!python/object/apply:os.system [true]", "is not YAML"),
    ],
)
def test_an_invalid_file_is_named(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dim", "wide", "dim must be a whole number, not 'wide'"),
        ("dim", 12.5, "dim must be a whole number, not 12.5"),
        ("dim", True, "dim must be a whole number, not True"),
        ("lr", "fast", "lr must be a number, not 'fast'"),
        ("join", 1, "join must be true or false, not 1"),
        ("sources", "text", "sources must be a list of texts, not 'text'"),
        ("tokenizer", None, "tokenizer must be text, not None"),
        ("seed", -(1 << 63) - 1, "seed must fit in 64 bits"),
        ("seed", 1 << 64, "seed must fit in 64 bits"),
    ],
)
def test_values_of_another_kind_are_refused(name, value, message):
    with pytest.raises(InputError, match=message):
        TrainingSettings(**{"out": "run", name: value})


def test_every_setting_is_an_option_with_the_same_default():
    command = typer.main.get_command(app).commands["train"]
    options = {parameter.name: parameter for parameter in command.params}
    for setting in settings_of(TrainingSettings):
        option = options[setting.name]
        assert option.default == (None if setting.required or setting.default == () else setting.default)
        assert setting.doc.text in option.help
        assert f"    {setting.name}: {setting.doc.text}" in TrainingSettings.__doc__


def test_every_field_is_documented():
    for settings in (ModelConfig, TrainingSettings, Sampling, Limits, Settings):
        names = [setting.name for setting in settings_of(settings)]
        assert names == [field.name for field in fields(settings)]


def test_the_page_of_settings_is_up_to_date():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(root / "docs" / "make_settings.py")],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert (root / "docs" / "settings.md").read_text("utf-8") == done.stdout
