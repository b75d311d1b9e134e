"""A model's sizes: one dataclass, and what is built, read and written from it."""

import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhesa import GatedExponentialSmoothingLM, GatedMHESA
from mhesa.errors import InputError
from mhesa.hf import MhesaConfig, MhesaForCausalLM
from mhesa.model.config import JSON_NAMES, ModelConfig, ModelSizes, _expansion_factor
from mhesa.training.settings import TrainingSettings

# No field has its default.
SIZES = {"dim": 20, "depth": 3, "heads": 2, "dim_mhesa": 12, "dim_expansion_factor": 1.5}
FORM = {"adaptive": True, "conv_size": 3, "dropout": 0.25}
CONFIG = ModelConfig(
    **SIZES, **FORM, backend="chunked", num_tokens=50, tie_word_embeddings=True, eos_token_id=7
)


def test_no_field_is_left_out():
    for field in fields(ModelConfig):
        assert getattr(CONFIG, field.name) != field.default, field.name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_parameters_are_counted(tied):
    config = replace(CONFIG, tie_word_embeddings=tied)
    for model in (config.build(), MhesaForCausalLM(MhesaConfig(**config.to_json()))):
        assert sum(parameter.numel() for parameter in model.parameters()) == config.parameters


def test_a_model_knows_its_configuration():
    assert ModelConfig.of(CONFIG.build()) == replace(CONFIG, eos_token_id=None)
    assert ModelConfig.of(CONFIG.empty()) == replace(CONFIG, eos_token_id=None)


def test_the_same_seed_builds_the_same_model():
    torch.manual_seed(0)
    built = replace(CONFIG, tie_word_embeddings=False).build()
    torch.manual_seed(0)
    direct = GatedExponentialSmoothingLM(num_tokens=50, **SIZES, **FORM)
    expected = direct.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in built.state_dict().items())


def test_an_empty_model_has_shapes_only():
    shapes = {name: value.shape for name, value in CONFIG.build().state_dict().items()}
    empty = CONFIG.empty().state_dict()
    assert {name: value.shape for name, value in empty.items()} == shapes
    assert {value.device.type for value in empty.values()} == {"meta"}


def test_json_is_that_of_transformers(tmp_path):
    MhesaConfig(**CONFIG.to_json()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.items() >= CONFIG.to_json().items()
    assert ModelConfig.from_json(saved) == replace(CONFIG, backend=None)


def test_every_size_is_a_field_for_transformers_and_a_training_setting():
    config = MhesaConfig(**CONFIG.to_json(), backend="chunked")
    assert config.to_model_config() == CONFIG
    for field in fields(ModelConfig):
        assert f"\n        {JSON_NAMES.get(field.name, field.name)}: " in MhesaConfig.__doc__ or (
            field.name == "eos_token_id"
        )
    settings = TrainingSettings(
        out="run", **SIZES, smoothing="adaptive", conv=3, dropout=0.25, backend="chunked"
    )
    assert settings.model_config(50, 7) == replace(CONFIG, tie_word_embeddings=False)


def test_blocks_and_models_take_every_size():
    names = {field.name for field in fields(ModelSizes)} | set(FORM)
    assert names - {"depth"} == set(inspect.signature(GatedMHESA).parameters)
    assert names | {"num_tokens"} == set(inspect.signature(GatedExponentialSmoothingLM).parameters)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1, not 0"),
        ({"dim": 64.0}, "dim must be a whole number, not 64.0"),
        ({"heads": True}, "heads must be a whole number, not True"),
        ({"heads": 3}, "dim_mhesa must be divisible by heads, but 256 is not by 3"),
        (
            {"dim_expansion_factor": 0},
            "dim_expansion_factor * dim must be at least 1 and fit in 64 bits, not 0",
        ),
        (
            {"dim_expansion_factor": 1e30},
            "dim_expansion_factor * dim must be at least 1 and fit in 64 bits, not 1.28e+32",
        ),
        (
            {"dim_expansion_factor": float("inf")},
            "dim_expansion_factor must be a number from -1e30 to 1e30, not inf",
        ),
        ({"dropout": 1}, "dropout must be at least 0 and below 1, not 1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, not 'no'"),
        ({"backend": "cuda"}, "unknown backend 'cuda'; choose from "),
    ],
    ids=str,
)
def test_a_bad_size_is_one_clear_line(values, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}.*$"):
        ModelConfig(**values)


@given(dim=st.integers(1, 2048), hidden=st.integers(1, 20000))
def test_the_expansion_factor_is_found_again(dim, hidden):
    assert int(_expansion_factor(hidden, dim) * dim) == hidden


def test_settings_are_declared_without_torch():
    code = (
        "import sys, mhesa.training.settings, mhesa.inference.sampling_settings, mhesa.serve.settings\n"
        "print({'torch', 'numpy', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60)
    assert done.stdout == "set()\n", done.stderr
