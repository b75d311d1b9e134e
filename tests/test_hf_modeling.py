import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from commands import run_code
from safetensors import safe_open
from scipy.stats import ks_2samp
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from mhesa import GatedExponentialSmoothingLM
from mhesa.hf import ByteTokenizer, MhesaCache, MhesaConfig, MhesaForCausalLM, MhesaModel
from mhesa.hf.cache import CACHE

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "heads": 4,
    "dim_mhesa": 24,
    "dim_expansion_factor": 2,
}
PLAIN_SIZES = {
    "num_tokens": 50,
    "dim": 16,
    "depth": 3,
    "heads": 4,
    "dim_mhesa": 24,
    "dim_expansion_factor": 2,
}


def make(seed=0, **fields):
    torch.manual_seed(seed)
    return MhesaForCausalLM(MhesaConfig(**{**SIZES, **fields})).eval()


@pytest.fixture
def model():
    return make().double()


@pytest.fixture
def ids():
    return torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(1))


# --- the same model -----------------------------------------------------------------------------------


def test_forward_is_the_plain_models(ids):
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


# --- the loss -----------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_shifted_labels(ids):
    model = make()
    labels = ids.masked_fill(ids % 5 == 0, -100)
    output = model(ids, labels=labels)
    flat, targets = output.logits[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1)
    torch.testing.assert_close(output.loss, F.cross_entropy(flat, targets))
    output = model(ids, labels=labels, num_items_in_batch=7)
    torch.testing.assert_close(output.loss, F.cross_entropy(flat, targets, reduction="sum") / 7)


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


# --- padding ------------------------------------------------------------------------------------------

LENGTHS = (7, 4, 0, 11)


def padded(side, seed=2):
    """Rows of `LENGTHS` real tokens among 11, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (len(LENGTHS), 11), generator=generator)
    mask = torch.zeros(len(LENGTHS), 11, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        if side == "scattered":
            mask[row, torch.randperm(11, generator=generator)[:length]] = 1
        else:
            mask[row, slice(11 - length, None) if side == "left" else slice(length)] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padding_changes_neither_outputs_nor_states(model, side):
    ids, mask = padded(side)
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    for row, real in enumerate(mask.bool()):
        if not real.any():
            assert all((layer.state[row] == 0).all() for layer in output.past_key_values.layers)
            continue
        alone = model(ids[row, real][None], output_hidden_states=True)
        torch.testing.assert_close(output.logits[row, real], alone.logits[0])
        for ours, theirs in zip(output.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(ours[row, real], theirs[0])
        for ours, theirs in zip(output.past_key_values.layers, alone.past_key_values.layers, strict=True):
            torch.testing.assert_close(ours.state[row], theirs.state[0])
    assert (output.logits[~mask.bool()] == 0).all()


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_a_cache_continues_through_padding(model, side):
    first, first_mask = padded(side)
    second, second_mask = padded(side, seed=3)
    mask = torch.cat([first_mask, second_mask], dim=1)
    whole = model(torch.cat([first, second], dim=1), attention_mask=mask)
    cache = model(first, attention_mask=first_mask).past_key_values
    before = [layer.state for layer in cache.layers]
    rest = model(second, attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(rest.logits, whole.logits[:, 11:])
    assert rest.past_key_values is cache
    assert cache.get_seq_length() == 22
    for layer, expected, old in zip(cache.layers, whole.past_key_values.layers, before, strict=True):
        torch.testing.assert_close(layer.state, expected.state)
        assert torch.equal(layer.state[2], old[2])
    again = copy.deepcopy(cache)
    step = model(second[:, :1], attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=cache)
    torch.testing.assert_close(step.logits, model(second[:, :1], past_key_values=again).logits)


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_not_a_number_at_padded_positions_changes_no_bit(side):
    model = make()
    ids, mask = padded(side)
    labels = ids.masked_fill(mask == 0, -100)
    results = []
    for poison in (0.0, float("nan")):
        embeddings = model.model.token_emb(ids).detach()
        embeddings[mask == 0] = poison
        embeddings.requires_grad_()
        model.zero_grad()
        output = model(inputs_embeds=embeddings, attention_mask=mask, labels=labels)
        output.loss.backward()
        # The first real token is predicted from the padding before it, which says nothing.
        grads = [parameter.grad for name, parameter in model.named_parameters() if "token_emb" not in name]
        states = [layer.state for layer in output.past_key_values.layers]
        results.append([output.logits, output.loss, embeddings.grad, *states, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[1][2][mask == 0] == 0).all()
    assert (results[1][2][mask == 1] != 0).any(dim=1).float().mean() > 0.8


# A label is the next place's, so with `labels` a token is predicted where no padding comes before it.
@pytest.mark.parametrize(
    ("side", "shifted"),
    [("left", False), ("right", False), ("left", True), ("right", True), ("scattered", True)],
)
def test_padding_changes_neither_loss_nor_gradients(model, side, shifted):
    """The loss is that of the rows by themselves: no token is predicted from the padding before it."""
    ids, mask = padded(side)
    alone = [row[real.bool()] for row, real in zip(ids, mask, strict=True) if real.sum() > 1]
    total = sum(model(row[None], labels=row[None]).loss * (len(row) - 1) for row in alone)
    (total / sum(len(row) - 1 for row in alone)).backward()
    expected = [total / 19, *(parameter.grad.clone() for parameter in model.parameters())]
    model.zero_grad()
    if shifted:
        # Every place has a label, padding too.
        labels = torch.full_like(ids, 7)
        for row, real in enumerate(mask.bool()):
            labels[row, real] = F.pad(ids[row, real][1:], (0, 1), value=-100)[: real.sum()]
        given = {"shift_labels": labels}
    else:
        given = {"labels": ids.masked_fill(mask == 0, -100)}
    loss = model(ids, attention_mask=mask, **given).loss
    loss.backward()
    torch.testing.assert_close([loss, *(p.grad for p in model.parameters())], expected)


def test_one_padding_token_on_the_left(model, ids):
    row = ids[:1]
    longer, mask = F.pad(row, (1, 0)), F.pad(torch.ones_like(row), (1, 0))
    labels = F.pad(row, (1, 0), value=-100)
    loss = model(longer, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, model(row, labels=row).loss)
    ignored = row[0, 4].item()
    loss = model(longer, attention_mask=mask, labels=longer, ignore_index=ignored).loss
    logits, targets = model(row).logits[:, :-1].float().transpose(1, 2), row[:, 1:]
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, ignore_index=ignored))


def test_gradients_flow_through_padding(model):
    ids, mask = padded("left")
    weights = torch.randn(4, 11, 50, dtype=torch.float64)
    (model(ids, attention_mask=mask).logits * weights).sum().backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for row, length in enumerate(LENGTHS):
        if length:
            (model(ids[row : row + 1, -length:]).logits * weights[row, -length:]).sum().backward()
    for grad, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def test_an_all_padding_batch(model):
    ids = torch.randint(50, (2, 5))
    output = model(ids, attention_mask=torch.zeros(2, 5))
    assert (output.logits == 0).all()
    assert output.logits.shape == (2, 5, 50)


@pytest.mark.parametrize("shape", [(3, 10), (2, 11), (3, 1, 11), (11,)])
def test_a_mask_of_another_shape(model, ids, shape):
    with pytest.raises(ValueError, match=r"attention_mask must be \(3, 11\) or longer for this batch, not"):
        model(ids, attention_mask=torch.ones(shape))


FORMS = {"fixed": {}, "adaptive": {"adaptive": True, "conv_size": 4}}


@pytest.mark.parametrize("form", FORMS)
def test_an_exported_graph_takes_any_padding(form):
    """In operators of torch alone, so that it runs where this package is not installed."""
    model = make(**FORMS[form])
    ids, mask = padded("left")
    program = torch.export.export(model, (ids,), {"attention_mask": mask})
    assert not any("mhesa::" in str(node.target) for node in program.graph.nodes)
    for side in ("left", "right", "scattered"):
        ids, mask = padded(side)
        expected = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(program.module()(ids, attention_mask=mask).logits, expected)


def test_a_model_compiles_as_one_graph_with_padding():
    torch._dynamo.reset()
    model = make(**FORMS["adaptive"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for side in ("left", "scattered"):
        ids, mask = padded(side)
        labels = ids.masked_fill(mask == 0, -100)
        ours, theirs = (run(ids, attention_mask=mask, labels=labels) for run in (compiled, model))
        torch.testing.assert_close([ours.loss, ours.logits], [theirs.loss, theirs.logits])
        for layer, expected in zip(ours[CACHE].layers, theirs[CACHE].layers, strict=True):
            torch.testing.assert_close(layer.state, expected.state)


# --- packing ------------------------------------------------------------------------------------------


def pack(sequences):
    offsets = torch.tensor([0, *itertools.accumulate(map(len, sequences))])
    return torch.cat(sequences)[None], offsets


def test_packed_sequences_do_not_meet(model, ids):
    sequences = [ids[0], ids[1, :4], ids[2, :1]]
    packed, offsets = pack(sequences)
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
    alone = [model(sequence[None]) for sequence in sequences]
    for arguments in (
        {"cu_seqlens": offsets},
        {"cu_seq_lens_q": offsets.int()},
        {"position_ids": positions},
        {"seq_idx": (positions == 0).cumsum(dim=1).int()},
    ):
        output = model(packed, **arguments)
        torch.testing.assert_close(output.logits, torch.cat([one.logits for one in alone], dim=1))
        for index, layer in enumerate(output.past_key_values.layers):
            states = torch.cat([one.past_key_values.layers[index].state for one in alone])
            torch.testing.assert_close(layer.state, states)
    step = model(ids[:, :1], past_key_values=output.past_key_values).logits
    for row, one in enumerate(alone):
        expected = model(ids[row : row + 1, :1], past_key_values=one.past_key_values).logits
        torch.testing.assert_close(step[row : row + 1], expected)


def test_no_packed_sequence_predicts_the_next_ones_first_token(model, ids):
    sequences = [ids[0], ids[1, :4], ids[2, :2]]
    packed, offsets = pack(sequences)
    total = sum(model(s[None], labels=s[None]).loss * (len(s) - 1) for s in sequences)
    for trailing in (offsets, F.pad(offsets, (0, 1), value=17)):
        loss = model(packed, labels=packed, cu_seqlens=trailing).loss
        torch.testing.assert_close(loss, total / 14)


@pytest.mark.parametrize("kernel_arguments", [False, True])
def test_what_the_flattening_collator_sends(ids, kernel_arguments):
    model = make()
    rows = [ids[0], ids[1, :4]]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=kernel_arguments)
    batch = collate([{"input_ids": row.tolist()} for row in rows])
    total = sum(model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows)
    torch.testing.assert_close(model(**batch).loss, total / 13)


def test_ordinary_positions_are_no_packing(model, ids):
    row = ids[:1]
    positions = torch.arange(11)[None]
    assert torch.equal(model(row, position_ids=positions).logits, model(row).logits)


def test_packing_in_several_rows(model, ids):
    positions = torch.arange(11) % 6
    with pytest.raises(ValueError, match="pack sequences into a batch of 1, or pass an attention_mask"):
        model(ids, position_ids=positions.repeat(3, 1))


def test_padding_within_packed_sequences(model, ids):
    mask = torch.ones(1, 11)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="leave out attention_mask or cu_seqlens"):
        model(ids[:1], attention_mask=mask, cu_seqlens=torch.tensor([0, 5, 11]))


# --- the cache ----------------------------------------------------------------------------------------


def test_a_cache_continues(model, ids):
    whole = model(ids).logits
    cache, pieces = MhesaCache(model.config), []
    for piece in ids.split([4, 1, 1, 5], dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert cache.get_seq_length() == 11
    assert cache.get_mask_sizes(2, 0) == (13, 0)
    assert cache.layers[0].batch_size == 3


def test_a_cache_holds_fp32_whatever_the_model(ids):
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        layers = make().to(dtype)(ids).past_key_values.layers
        assert all(layer.state.dtype == expected for layer in layers)
        assert all(layer.state.shape == (3, 24) for layer in layers)


def test_rows_of_a_cache(model, ids):
    cache = model(ids).past_key_values
    states = [layer.state for layer in cache.layers]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert all(torch.equal(c.state, s[[2, 0, 0]]) for c, s in zip(cache.layers, states, strict=True))
    cache.batch_select_indices(torch.tensor([0, 1]))
    cache.batch_repeat_interleave(2)
    assert all(torch.equal(c.state, s[[2, 2, 0, 0]]) for c, s in zip(cache.layers, states, strict=True))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_copies_of_a_cache_go_their_own_ways(model, ids):
    cache = model(ids).past_key_values
    kept = copy.deepcopy(cache)
    first = model(ids[:, :2], past_key_values=cache).logits
    assert (cache.get_seq_length(), kept.get_seq_length()) == (13, 11)
    assert torch.equal(model(ids[:, :2], past_key_values=kept).logits, first)


def test_an_empty_cache_has_no_rows_to_change(model):
    cache = MhesaCache(model.config)
    cache.reorder_cache(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].batch_size == -1
    assert cache.layers[0].get_max_length() == cache.layers[0].get_max_cache_shape() == -1


def test_what_a_cache_cannot_do(model, ids):
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"cannot forget its last tokens; copy\.deepcopy"):
        cache.crop(-1)
    with pytest.raises(TypeError, match="holds states, not keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_a_cache_is_never_dropped_in_silence(model, ids):
    with pytest.raises(TypeError, match=r"must be a MhesaCache, not a DynamicCache: make it with"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="leave one of them out"):
        model(ids, past_key_values=MhesaCache(model.config), use_cache=False)
    with pytest.raises(TypeError, match="two names of one argument: pass one of them"):
        model(ids, past_key_values=MhesaCache(model.config), cache=MhesaCache(model.config))
    with pytest.raises(ValueError, match="is for 2 blocks and this model has 3"):
        model(ids, past_key_values=MhesaCache(MhesaConfig(num_hidden_layers=2)))
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="holds 3 sequences and this batch has 2"):
        model(ids[:2], past_key_values=cache)


def test_when_there_is_a_cache(model, ids):
    assert model(ids).past_key_values is not None
    assert model(ids, use_cache=False).past_key_values is None
    assert make(use_cache=False)(ids).past_key_values is None
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None


# --- checkpoints --------------------------------------------------------------------------------------


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


# --- training -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    plain, checkpointed = make().double().train(), make().double().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids, mask = padded("left")
    # Recomputing reentrantly, torch cannot pass a gradient from one call to the one before.
    chunks = [(ids, mask)] if reentrant else [(ids, mask), (ids.flip(1), mask.flip(1))]
    runs = []
    for model in (plain, checkpointed):
        calls = []
        hook = model.model.layers[0].to_gate.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        cache = MhesaCache(model.config)
        logits = [
            model(chunk, attention_mask=chunk_mask, past_key_values=cache).logits
            for chunk, chunk_mask in chunks
        ]
        torch.cat(logits).square().sum().backward()
        hook.remove()
        assert len(calls) == len(chunks) * (2 if model is checkpointed else 1)
        runs.append([*logits, *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs)


class Bytes(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.arange(index, index + 6) % 50
        return {"input_ids": ids, "labels": ids}


def test_the_trainer_trains_evaluates_and_saves(tmp_path):
    model = make()
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=6,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Bytes(),
        eval_dataset=Bytes(),
        compute_metrics=lambda predicted: {"shape": list(predicted.predictions.shape)},
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_shape"] == [8, 6, 50]
    assert after["eval_loss"] < before["eval_loss"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    ids = Bytes()[0]["input_ids"][None]
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


# The loss of large vocabularies


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_the_fused_loss_is_the_loss(autocast):
    torch.manual_seed(0)
    model = MhesaForCausalLM(
        MhesaConfig(vocab_size=9000, hidden_size=32, num_hidden_layers=1, heads=2, dim_mhesa=8)
    )
    ids, targets = torch.randint(9000, (2, 2, 100))
    found = []
    for fused in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = model(ids, shift_labels=targets, loss_only=fused)
        outputs.loss.backward()
        assert (outputs.logits is None) == fused
        found.append([outputs.loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(
            fused, plain, rtol=2e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-7
        )
    labels = torch.cat([ids[:, :1], targets[:, :-1]], dim=1)
    expected = model(ids, labels=labels, logits_to_keep=0).logits[:, :-1].transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(expected, labels[:, 1:])
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


def test_the_fused_loss_never_holds_all_logits():
    """Memory at its peak, against that of the logits alone."""
    code = (
        "import resource, torch, mhesa.hf as hf\n"
        "config = hf.MhesaConfig(vocab_size=20_000, hidden_size=64, num_hidden_layers=1, dim_mhesa=8)\n"
        "model = hf.MhesaForCausalLM(config)\n"
        "ids = torch.randint(20_000, (1, 64))\n"
        "model(ids, shift_labels=ids, loss_only=True).loss.backward()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "ids = torch.randint(20_000, (1, 2048))\n"
        "model(ids, shift_labels=ids, loss_only=True).loss.backward()\n"
        "print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))\n"
    )
    assert 0 < int(run_code(code)[0]) < 2048 * 20_000 * 4 / 2
