"""Training by transformers: the loss, recomputed gradients, the Trainer."""

import pytest
import torch
import torch.nn.functional as F
from hf_models import make, padded, some_ids
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mhesa.hf import MhesaCache


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
