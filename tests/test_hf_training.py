"""Training by transformers: the loss, recomputed gradients, the Trainer."""

import pytest
import torch
import torch.nn.functional as F
from hf_models import make, padded, some_ids
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from mhesa.hf import ByteTokenizer, MhesaCache


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
    assert model(ids, labels=labels, num_items_in_batch=None).loss == model(ids, labels=labels).loss
    assert model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=7).loss == 0


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


@pytest.mark.parametrize("loss", ["model", "trainer", "evaluation"])
def test_the_side_of_padding_changes_no_loss(tmp_path, loss):
    texts = ["a", "some words", "b c", "one more text"]
    found = []
    for side in ("left", "right"):
        tokenizer = ByteTokenizer(padding_side=side)
        rows = [tokenizer(text) for text in texts]
        if loss == "model":
            batch = tokenizer.pad(rows, return_tensors="pt")
            found.append(make(vocab_size=257)(**batch, labels=batch["input_ids"]).loss.item())
            continue
        arguments = TrainingArguments(
            tmp_path / side, max_steps=1, per_device_train_batch_size=4, per_device_eval_batch_size=4,
            report_to=[], logging_steps=1, use_cpu=True, learning_rate=0.0,
        )  # fmt: skip
        trainer = Trainer(
            make(vocab_size=257),
            arguments,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            train_dataset=rows,
            eval_dataset=rows,
        )
        figures = trainer.evaluate() if loss == "evaluation" else trainer.train().metrics
        found.append(figures["eval_loss" if loss == "evaluation" else "train_loss"])
    model, nats, tokens = make(vocab_size=257), 0.0, 0
    for text in texts:
        ids = torch.tensor([list(text.encode())])
        if ids.shape[1] > 1:
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert found == pytest.approx([nats / tokens] * 2, rel=1e-5)


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
