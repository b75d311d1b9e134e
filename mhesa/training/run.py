"""A training run from settings to a folder with a model in it."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PrinterCallback, TrainingArguments, set_seed

from mhesa.data import Document, Holdout, Windows, read_sources, tokenize
from mhesa.evaluation import Score, evaluate
from mhesa.generation import stream
from mhesa.hf.modeling import MhesaForCausalLM
from mhesa.hf.tokenization import ByteTokenizer
from mhesa.model import GatedExponentialSmoothingLM
from mhesa.sampling import Sampling
from mhesa.training.folder import (
    CHECKPOINTS,
    CURVE,
    RUN_FILES,
    append_metrics,
    check_free,
    check_same_corpus,
    checkpoint_to_resume,
    prepare,
    read_metrics,
)
from mhesa.training.plot import draw_curve
from mhesa.training.progress import ProgressDisplay
from mhesa.training.settings import TrainingSettings
from mhesa.training.trainer import Budget, BudgetTrainer, Meter, StopOnSignal

# The Trainer wants a number of steps; the budget ends training long before.
ENDLESS = 2**31
STEPS_BETWEEN_ROWS = 10
SAMPLE_TOKENS = 300


@dataclass(frozen=True)
class Corpus:
    """What a run trains on and what it is measured on."""

    documents: int
    training_bytes: int
    tokens: np.ndarray
    held_out: list[Document]
    sha256: str

    @property
    def bytes_a_token(self) -> float:
        """Bytes of training text that a training token stands for."""
        return self.training_bytes / len(self.tokens)

    @property
    def held_out_bytes(self) -> int:
        """Bytes kept from training."""
        return sum(len(document.data) for document in self.held_out)

    def facts(self) -> dict[str, Any]:
        """What is written down of the corpus."""
        return {
            "documents": self.documents,
            "training_bytes": self.training_bytes,
            "training_tokens": len(self.tokens),
            "held_out_bytes": self.held_out_bytes,
            "sha256": self.sha256,
        }


@dataclass(frozen=True)
class Summary:
    """What a run comes to."""

    folder: Path
    steps: int
    seconds: float
    score: Score
    compressors: dict[str, float]
    sample: bytes

    @property
    def files(self) -> list[str]:
        """Names of what the run has put into the folder."""
        return [name for name in RUN_FILES if (self.folder / name).exists()]


class Stopped(Exception):  # noqa: N818 - a wish that was met, not an error
    """A signal ended training early, after its last step was saved."""

    def __init__(self, number: signal.Signals, step: int, folder: Path) -> None:
        super().__init__(f"stopped by {number.name} after step {step}")
        self.signal = number
        self.step = step
        self.folder = folder


def train(
    settings: TrainingSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Summary:
    """Train a model on text, save it with all that belongs to it, and measure it on text held out.

    Args:
        settings: what to do.
        resume: go on from the newest checkpoint in `settings.out`.
        overwrite: replace the run that `settings.out` holds.
        console: where progress is shown; nowhere if omitted.

    Raises:
        InputError: sources, sizes or a folder that cannot be; nothing was written then.
        TrainingError: the loss became NaN or infinite.
        Stopped: SIGINT or SIGTERM came; the folder holds a model and a checkpoint of the last step.
    """
    settings = settings.resolve()
    console = console or Console(quiet=True)
    folder = Path(settings.out)
    checkpoint = checkpoint_to_resume(settings) if resume else None
    if not resume and not overwrite:
        check_free(folder)
    tokenizer = ByteTokenizer()
    corpus = load_corpus(settings, tokenizer)
    if resume:
        check_same_corpus(folder, corpus.sha256)
    set_seed(settings.seed)
    model = MhesaForCausalLM(settings.model_config(len(tokenizer)))
    windows = Windows(
        corpus.tokens,
        context=settings.context,
        seed=settings.seed,
        length=ENDLESS * settings.windows_a_step,
    )
    prepare(folder, settings, corpus.facts(), checkpoint)
    _announce(console, settings, corpus, model.num_parameters())
    budget = Budget(settings.steps, settings.minutes)
    stop = StopOnSignal()
    with ProgressDisplay(console, budget) as display:
        trainer = _build_trainer(settings, model, windows, corpus, budget, display, stop)
        display.open("training", 1.0)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            stop.restore()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if stop.received is not None:
            raise Stopped(stop.received, trainer.state.global_step, folder)
        plain = model.to_plain().eval()
        display.open("measuring", sum(len(document.data) for document in corpus.held_out))
        score = evaluate(plain, tokenizer, corpus.held_out, display.advance)
    summary = Summary(
        folder=folder,
        steps=trainer.state.global_step,
        seconds=budget.seconds,
        score=score,
        compressors=_compress(corpus.held_out),
        sample=_sample(plain, tokenizer, settings.seed),
    )
    _record(summary)
    return summary


def load_corpus(settings: TrainingSettings, tokenizer: ByteTokenizer) -> Corpus:
    """Read the sources, hold text out and tokenise the rest."""
    documents = read_sources(settings.sources)
    kept, held_out = Holdout.parse(settings.holdout).split(documents)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document.data).to_bytes(8, "big") + document.data)
    return Corpus(
        documents=len(documents),
        training_bytes=sum(len(document.data) for document in kept),
        tokens=tokenize(kept, tokenizer),
        held_out=held_out,
        sha256=digest.hexdigest(),
    )


def _announce(console: Console, settings: TrainingSettings, corpus: Corpus, parameters: int) -> None:
    documents = "1 document" if corpus.documents == 1 else f"{corpus.documents:,} documents"
    budget = f"{settings.steps:,} steps" if settings.steps else f"{settings.minutes:g} minutes"
    console.print(
        f"[bold]{corpus.training_bytes:,}[/] bytes to train on from {documents}, "
        f"[bold]{corpus.held_out_bytes:,}[/] held out ({settings.holdout})\n"
        f"[bold]{parameters:,}[/] parameters: dim {settings.dim}, depth {settings.depth}, "
        f"{settings.heads} heads over {settings.dim_mhesa}\n"
        f"[bold]{budget}[/] on {settings.device} in {settings.precision}, "
        f"{settings.batch_size} x {settings.context} tokens a step",
        highlight=False,
    )


def _build_trainer(
    settings: TrainingSettings,
    model: MhesaForCausalLM,
    windows: Windows,
    corpus: Corpus,
    budget: Budget,
    display: ProgressDisplay,
    stop: StopOnSignal,
) -> BudgetTrainer:
    folder = Path(settings.out)

    def on_row(row: dict[str, float]) -> None:
        append_metrics(folder, row)
        display.show(row)

    arguments = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        max_steps=ENDLESS,
        per_device_train_batch_size=settings.windows_a_step,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=settings.precision == "bf16",
        use_cpu=settings.device == "cpu",
        seed=settings.seed,
        logging_steps=STEPS_BETWEEN_ROWS,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=settings.device != "cpu",
    )
    meter = Meter(budget, settings.windows_a_step * settings.context, corpus.bytes_a_token, on_row)
    trainer = BudgetTrainer(
        model=model,
        args=arguments,
        train_dataset=windows,
        callbacks=[budget, meter, display, stop],
        budget=budget,
        warmup=settings.warmup,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _compress(documents: Iterable[Document]) -> dict[str, float]:
    data = b"".join(document.data for document in documents)
    sizes = {"xz -9": len(lzma.compress(data, preset=9)), "gzip -9": len(gzip.compress(data, 9))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def _sample(model: GatedExponentialSmoothingLM, tokenizer: ByteTokenizer, seed: int) -> bytes:
    start = torch.tensor([tokenizer.eos_token_id])
    tokens = stream(model, start, max_new_tokens=SAMPLE_TOKENS, sampling=Sampling(temperature=0.8), seed=seed)
    return tokenizer.decode_bytes(list(tokens))


def _record(summary: Summary) -> None:
    rows = [row for row in read_metrics(summary.folder) if "loss" in row]
    held_out = {f"held_out_{name}": value for name, value in summary.score.as_dict().items()}
    compressors = {f"{name.split()[0]}_bits_per_byte": bits for name, bits in summary.compressors.items()}
    append_metrics(
        summary.folder,
        {"step": summary.steps, "seconds": round(summary.seconds, 3), **held_out, **compressors},
    )
    levels = {"held out": summary.score.bits_per_byte, **summary.compressors}
    draw_curve(rows, levels, summary.folder / CURVE)
