"""The configuration for transformers: its sizes, its names, what is saved."""

import json
import re

import pytest
from transformers import AutoConfig

from mhesa.hf import MhesaConfig


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, not 0"),
        ({"hidden_size": -1}, "hidden_size must be at least 1, not -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, not 0"),
        ({"heads": 0}, "heads must be at least 1, not 0"),
        ({"dim_mhesa": -8}, "dim_mhesa must be at least 1, not -8"),
        (
            {"dim_expansion_factor": 0},
            "dim_expansion_factor * hidden_size must be at least 1 and fit in 64 bits, not 0",
        ),
        (
            {"dim_expansion_factor": float("nan")},
            "dim_expansion_factor must be a number from -1e30 to 1e30, not nan",
        ),
        ({"dim_expansion_factor": "4"}, "dim_expansion_factor must be a number, not '4'"),
        ({"hidden_size": 64.0}, "hidden_size must be a whole number, not 64.0"),
        ({"dim": "64"}, "hidden_size must be a whole number, not '64'"),
        ({"heads": 3}, "dim_mhesa must be divisible by heads, but 256 is not by 3"),
        ({"backend": "cuda"}, "unknown backend 'cuda'; choose from "),
    ],
    ids=str,
)
def test_a_bad_size_is_one_clear_line(field, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*$"):
        MhesaConfig(**field)


def test_the_plain_models_names_are_aliases():
    config = MhesaConfig(num_tokens=300, dim=32, depth=3)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (300, 32, 3)
    assert (config.num_tokens, config.dim, config.depth) == (300, 32, 3)


def test_every_field_survives_saving(tmp_path):
    config = MhesaConfig(
        vocab_size=300,
        hidden_size=20,
        num_hidden_layers=3,
        heads=4,
        dim_mhesa=12,
        dim_expansion_factor=1.5,
        use_cache=False,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=[2, 3],
        pad_token_id=None,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MhesaConfig
    for name in json.loads((tmp_path / "config.json").read_text()):
        if name != "transformers_version":
            assert getattr(loaded, name) == getattr(config, name), name
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.dim_expansion_factor == 1.5
    assert loaded.eos_token_id == [2, 3]
    assert loaded.pad_token_id is None


def test_the_backend_is_never_saved(tmp_path):
    config = MhesaConfig(backend="fft")
    assert config.backend == "fft"
    config.save_pretrained(tmp_path)
    assert "backend" not in (tmp_path / "config.json").read_text()
    assert "backend" not in config.to_json_string(use_diff=False)
    assert AutoConfig.from_pretrained(tmp_path).backend is None
    assert AutoConfig.from_pretrained(tmp_path, backend="chunked").backend == "chunked"


def test_token_ids_are_the_byte_tokenizers_where_they_exist():
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(MhesaConfig(), name) for name in ids] == [256] * 3
    assert [getattr(MhesaConfig(vocab_size=258), name) for name in ids] == [256] * 3
    assert [getattr(MhesaConfig(vocab_size=256), name) for name in ids] == [None] * 3
    assert MhesaConfig(vocab_size=100, eos_token_id=7).eos_token_id == 7


def test_attributes_that_other_libraries_ask_for(tmp_path):
    config = MhesaConfig(num_attention_heads=4, num_hidden_layers=3)
    assert config.heads == config.num_attention_heads == 4
    assert config.layer_types == ["linear_attention"] * 3
    assert MhesaConfig.auto_map == config.auto_map
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["heads"] == 4
    assert saved["auto_map"] == config.auto_map
    assert saved.keys().isdisjoint({"layer_types", "num_attention_heads"})
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
