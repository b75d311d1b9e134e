"""Padding and packed sequences change nothing about the sequences themselves."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hf_models import LENGTHS, make, padded, some_ids
from transformers import DataCollatorWithFlattening

from mhesa.hf.cache import CACHE


@pytest.fixture
def model():
    return make().double()


@pytest.fixture
def ids():
    return some_ids()


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


# Packing


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
def test_batches_of_the_flattening_collator(ids, kernel_arguments):
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
