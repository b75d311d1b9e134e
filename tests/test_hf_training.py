"""Training by transformers: the loss, recomputed gradients, the Trainer."""

import pytest
import torch
import torch.nn.functional as F
from commands import run_code
from hf_models import make, padded, some_ids
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mhesa.hf import MhesaCache, MhesaConfig, MhesaForCausalLM


@pytest.fixture
def ids():
    return some_ids()


def test_the_loss_is_the_cross_entropy_of_shifted_labels(ids):
    model = make()
    labels = ids.masked_fill(ids % 5 == 0, -100)
    output = model(ids, labels=labels)
    flat, targets = output.logits[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1)
    torch.testing.assert_close(output.loss, F.cross_entropy(flat, targets))
    output = model(ids, labels=labels, num_items_in_batch=7)
    torch.testing.assert_close(output.loss, F.cross_entropy(flat, targets, reduction="sum") / 7)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_the_fused_loss_equals_the_loss(autocast):
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
        "import torch, mhesa.hf as hf\n"
        "def train(tokens, length):\n"
        "    config = hf.MhesaConfig(vocab_size=tokens, hidden_size=64, num_hidden_layers=1, dim_mhesa=8)\n"
        "    model, ids = hf.MhesaForCausalLM(config), torch.randint(tokens, (1, length))\n"
        "    model(ids, shift_labels=ids, loss_only=True).loss.backward()\n"
        "def kilobytes(name):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return int(next(line.split()[1] for line in lines if line.startswith(name)))\n"
        # What is compiled or loaded when it is first used takes memory too.
        "train(300, 2048), train(20_000, 64)\n"
        # proc(5): the peak begins again from what is resident now.
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = kilobytes('VmRSS')\n"
        "train(20_000, 2048)\n"
        "print(1024 * (kilobytes('VmHWM') - before))\n"
    )
    assert 0 < int(run_code(code)[0]) < 2048 * 20_000 * 4 / 2


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_result(reentrant):
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
