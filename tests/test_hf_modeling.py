"""The model as a class of transformers: the plain model's, its arguments, and checkpoints."""

import pytest
import torch
from commands import run_code
from hf_models import PLAIN_SIZES, make, some_ids
from safetensors import safe_open
from scipy.stats import ks_2samp
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mhesa import GatedExponentialSmoothingLM
from mhesa.hf import ByteTokenizer, MhesaForCausalLM, MhesaModel


@pytest.fixture
def model():
    return make().double()


@pytest.fixture
def ids():
    return some_ids()


def test_forward_equals_the_plain_models(ids):
    torch.manual_seed(0)
    lm = GatedExponentialSmoothingLM(**PLAIN_SIZES)
    model = MhesaForCausalLM.from_plain(lm)
    assert model.training
    assert torch.equal(model(ids).logits, lm(ids))
    assert {f"model.{name}" if "to_logits" not in name else name for name in lm.state_dict()} == set(
        model.state_dict()
    )
    before = lm(ids)
    with torch.no_grad():
        model.to_logits.weight.zero_()
        model.model.token_emb.weight.zero_()
    assert torch.equal(lm(ids), before)


def test_from_plain_keeps_type_mode_backend_and_ties(ids):
    lm = GatedExponentialSmoothingLM(**PLAIN_SIZES, backend="reference").double().eval()
    lm.to_logits.weight = lm.token_emb.weight
    model = MhesaForCausalLM.from_plain(lm, pad_token_id=3)
    assert not any(module.training for module in model.modules())
    assert model.dtype == torch.float64
    assert model.model.layers[0].mhesa.backend == "reference"
    assert model.to_logits.weight is model.model.token_emb.weight
    assert (model.config.pad_token_id, model.config.eos_token_id) == (3, None)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(ids).logits, lm(ids))


def test_from_plain_leaves_the_random_state_alone():
    lm = GatedExponentialSmoothingLM(**PLAIN_SIZES)
    state = torch.get_rng_state()
    MhesaForCausalLM.from_plain(lm)
    assert torch.equal(torch.get_rng_state(), state)


def test_to_plain_shares_its_parameters(model, ids):
    lm = model.to_plain()
    assert type(lm) is GatedExponentialSmoothingLM
    assert not lm.training
    assert torch.equal(lm(ids), model(ids).logits)
    shared = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in lm.parameters()} == shared
    logits, state = lm(ids, return_state=True)
    assert logits.shape == (3, 11, 50)
    stepped = lm.step(ids[:, 0], state)[0]
    torch.testing.assert_close(stepped, model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1])


def test_to_plain_of_tied_weights(ids):
    model = make(tie_word_embeddings=True)
    assert torch.equal(model.to_plain()(ids), model(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_model_starts_as_a_plain_one(tied):
    """Both must be draws from the same distributions: every parameter, over several models."""
    ours, theirs = {}, {}
    for seed in range(20):
        for name, value in make(seed, tie_word_embeddings=tied).named_parameters():
            ours.setdefault(name.removeprefix("model."), []).append(value.detach().flatten())
        torch.manual_seed(1000 + seed)
        for name, value in GatedExponentialSmoothingLM(**PLAIN_SIZES).named_parameters():
            theirs.setdefault(name, []).append(value.detach().flatten())
    assert set(theirs) - set(ours) == ({"to_logits.weight"} if tied else set())
    for name in ours:
        a, b = torch.cat(ours[name]), torch.cat(theirs[name])
        if a.unique().numel() == 1:
            assert torch.equal(a, b), name
        else:
            assert ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-4, name


def test_missing_weights_start_fresh_and_loaded_ones_stay(tmp_path):
    model = make()
    missing = {
        "model.layers.0.mhesa.alphas",
        "model.layers.1.to_out.bias",
        "model.layers.2.norm.weight",
        "to_logits.weight",
    }
    state = {name: value for name, value in model.state_dict().items() if name not in missing}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, report = MhesaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == missing
    for name, value in loaded.state_dict().items():
        if name not in missing:
            assert torch.equal(value, model.state_dict()[name]), name
    fresh = loaded.state_dict()
    assert torch.equal(fresh["model.layers.2.norm.weight"], torch.ones(16))
    assert 0 < fresh["to_logits.weight"].abs().max() <= 16**-0.5
    assert 0 < fresh["model.layers.1.to_out.bias"].abs().max() <= 32**-0.5
    assert 0.01 < fresh["model.layers.0.mhesa.alphas"].std() < 5


@pytest.mark.parametrize("mean_resizing", [False, True])
def test_resized_embeddings(model, ids, mean_resizing):
    before = model(ids).logits
    model.resize_token_embeddings(60, mean_resizing=mean_resizing)
    assert model.config.vocab_size == 60
    after = model(ids).logits
    assert after.shape == (3, 11, 60)
    torch.testing.assert_close(after[..., :50], before)
    fresh = model.model.token_emb.weight[50:]
    # transformers draws near the mean of the old embeddings, or asks for a new embedding's values.
    assert fresh.std() < 0.3 if mean_resizing else 0.7 < fresh.std() < 1.4
    assert model.to_plain()(ids).shape == after.shape


def test_logits_to_keep(model, ids):
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])


def test_embeddings_in_place_of_ids(model, ids):
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(ids).logits)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="pass either input_ids or inputs_embeds"):
            model(**arguments)


def test_tuples_and_hidden_states(model, ids):
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[0], model.model.token_emb(ids))
    assert torch.equal(model.to_logits(output.hidden_states[-1]), output.logits)
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)
    assert model(ids).hidden_states is None


def test_an_unknown_argument_is_refused(model, ids):
    expected = model(ids).logits
    assert torch.equal(model(ids, output_attentions=False, head_mask=None).logits, expected)
    for argument in ({"output_attentions": True}, {"past_key_value": 1}, {"token_type_ids": ids}):
        for called in (model, model.model):
            with pytest.raises(TypeError, match=f"got an unexpected argument '{next(iter(argument))}'"):
                called(ids, **argument)


# Checkpoints


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_loads_by_the_auto_classes(tmp_path, ids, tied):
    model = make(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".py", ".safetensors"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "model.layers.0.mhesa.param_D" in file.keys()  # noqa: SIM118 no mapping
        assert ("to_logits.weight" in file.keys()) is not tied  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, backend="reference")
    assert type(loaded) is MhesaForCausalLM
    assert loaded.model.layers[0].mhesa.backend == "reference"
    assert (loaded.to_logits.weight is loaded.model.token_emb.weight) is tied
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MhesaModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ByteTokenizer
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, backend="cuda")


def test_one_import_is_enough(tmp_path, ids):
    model = make()
    model.save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    program = (
        f"path = {str(tmp_path)!r}\n"
        "import sys, torch\n"
        "assert 'transformers' not in sys.modules\n"
        "import mhesa.hf\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        "assert AutoConfig.from_pretrained(path).dim == 16\n"
        "assert AutoTokenizer.from_pretrained(path).encode('a') == [97]\n"
        "model = AutoModelForCausalLM.from_pretrained(path)\n"
        "print(model(torch.tensor([[1, 2, 3]])).logits.sum().item())\n"
    )
    expected = model(torch.tensor([[1, 2, 3]])).logits.sum().item()
    assert float(run_code(program)[0]) == pytest.approx(expected, rel=1e-4)


def test_another_tokenizer_is_left_alone(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?")))
    make().save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert not isinstance(loaded, ByteTokenizer)
    assert loaded.encode("a") == [0]


def test_loading_in_bf16_keeps_the_decays_in_fp32(tmp_path, ids):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    new = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        kept = name.endswith(("alphas", "dampen_factors"))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert new.get_parameter(name).dtype == parameter.dtype
        if kept:
            assert torch.equal(parameter, model.get_parameter(name))
    logits = loaded(ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(ids).logits, atol=0.1, rtol=0.1)
    assert loaded.generate(ids, max_new_tokens=2).shape == (3, 13)
