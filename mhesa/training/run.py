"""A training run from settings to a folder with a model in it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from safetensors import SafetensorError
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from mhesa.atomic_io import write_folder
from mhesa.data import Corpus, Source, Windows, open_corpus
from mhesa.data.cache import cache_folder, lock
from mhesa.errors import InputError, TrainingError
from mhesa.hf.configuration import MhesaConfig
from mhesa.hf.modeling import MhesaForCausalLM
from mhesa.hf.tokenization import ByteTokenizer
from mhesa.hf.vocabulary import TextTokenizer, open_tokenizer, train_bpe
from mhesa.inference.evaluation import evaluate
from mhesa.model.loading import load_tokenizer
from mhesa.ops.cpu.memory import keep_memory
from mhesa.ops.devices import best_device
from mhesa.tokenizers import Bytes
from mhesa.training import checkpoint
from mhesa.training.checkpoint import PREFIX, Progress
from mhesa.training.distributed import barrier, is_parted, part, processes, rank
from mhesa.training.folder import (
    CHECKPOINTS,
    COMPLETE,
    CURVE,
    append_metrics,
    check_free,
    check_same_corpus,
    checkpoint_to_resume,
    prepare,
    read_metrics,
)
from mhesa.training.memory import check_memory
from mhesa.training.outcome import Summary, compress, first_bytes, save_model, with_weights, write_sample
from mhesa.training.plot import draw_curve
from mhesa.training.progress import ProgressDisplay
from mhesa.training.reports import report
from mhesa.training.schedule import Budget, StopOnSignal, learning_rate
from mhesa.training.settings import TrainingSettings
from mhesa.training.steps import AfterStep, Evaluation
from mhesa.training.trainer import Batches, StepTrainer

# The Trainer wants a number of steps; the budget ends training long before.
ENDLESS = 2**31
SECONDS_BETWEEN_CURVES = 60.0
# Of the held-out text, what evaluations on the way read.
EVALUATED_BYTES = 1 << 17

AnyTokenizer = Bytes | TextTokenizer


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

    Run by `torchrun` or `accelerate launch`, every process calls this, and the first one writes.

    Args:
        settings: what to do.
        resume: go on from the newest whole checkpoint in `settings.out`.
        overwrite: replace the run that `settings.out` holds.
        console: where progress is shown; nowhere if omitted.

    Raises:
        InputError: sources, sizes or a folder that cannot be; nothing was written then.
        TrainingError: the loss became NaN or infinite, or a checkpoint could not be written.
        Stopped: SIGINT or SIGTERM came; the folder holds a model and a checkpoint of the last step.
    """
    _join_processes(settings.device)
    settings = settings.resolve()
    console = console if console is not None and rank() == 0 else Console(quiet=True)
    run = Run.begin(settings, resume, overwrite, console)
    if settings.device == "cpu":
        keep_memory()
    with StopOnSignal() as signals, run.display, report(settings.report_to):
        trainer = run.trainer(signals)
        run.display.open("training", 1.0)
        start = None if run.checkpoint is None else str(run.checkpoint)
        run.budget.start(run.progress.seconds)
        try:
            trainer.train(resume_from_checkpoint=start)
            return run.finish(trainer)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise TrainingError(
                f"cannot write to {run.folder}: {reason}; its checkpoints are whole, "
                "and --resume goes on from the newest"
            ) from error


def _join_processes(device: str) -> None:
    """Meet the processes that `torchrun` or `accelerate launch` started with this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=(best_device() if device == "auto" else device) == "cpu")


class Run:
    """A run that is ready to train: its folder prepared, its text tokenised, its model made."""

    def __init__(
        self,
        settings: TrainingSettings,
        console: Console,
        tokenizer: AnyTokenizer,
        corpus: Corpus,
        start: Path | None,
        display: ProgressDisplay,
    ) -> None:
        self.settings = settings
        self.folder = Path(settings.out)
        self.console = console
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.checkpoint = start
        self.progress = Progress() if start is None else checkpoint.load_progress(start)
        self.display = display
        self.budget = display.budget
        self._drawn = time.monotonic()
        self.windows = Windows(
            corpus.tokens,
            context=settings.context,
            rows=settings.windows_a_step,
            seed=settings.seed,
            streams=settings.carry_state,
        )
        check_memory(settings, len(tokenizer))
        set_seed(settings.seed)
        config = settings.model_config(len(tokenizer), tokenizer.eos_token_id)
        self.config = MhesaConfig(**config.to_json(), backend=config.backend)
        self.model = MhesaForCausalLM(self.config)
        if settings.recompute:
            _recompute(self.model)
        if settings.fsdp and processes() > 1:
            part(self.model, self.model.model.layers, settings.device)

    @classmethod
    def begin(cls, settings: TrainingSettings, resume: bool, overwrite: bool, console: Console) -> Run:
        """Check everything that can be mistaken, and only then touch the folder."""
        folder = Path(settings.out)

        def say(damage: str) -> None:
            console.print(damage, style="yellow", highlight=False, markup=False, soft_wrap=True)

        start = checkpoint_to_resume(settings, say) if resume else None
        if not resume and not overwrite and rank() == 0:
            check_free(folder)
        if "-" in settings.sources and processes() > 1:
            raise InputError("many processes cannot share standard input; give a file")
        source = Source(settings.sources, text_field=settings.text_field, holdout=settings.holdout)
        if resume:
            check_same_corpus(folder, source.sha256)
        display = ProgressDisplay(console, Budget(settings.steps, settings.minutes))
        with display:
            tokenizer = load_tokenizer(folder) if resume else make_tokenizer(settings, source)
            display.open("tokenising", max(source.size, 1))
            corpus = open_corpus(source, tokenizer, display.advance)
            display.close()
        run = cls(settings, console, tokenizer, corpus, start, display)
        if rank() == 0:
            prepare(folder, settings, asdict(corpus.facts), None if start is None else run.progress.step)
            tokenizer.save_pretrained(folder)
        barrier()
        _announce(console, settings, corpus, run.model.num_parameters())
        if start is not None:
            console.print(f"goes on from [bold]step {run.progress.step:,}[/]", highlight=False)
        return run

    def trainer(self, signals: StopOnSignal) -> StepTrainer:
        """The engine of this run."""
        settings, budget = self.settings, self.budget
        self.after_step = AfterStep(
            settings,
            budget,
            self.progress,
            self.corpus.bytes_a_token,
            self._evaluate,
            self._on_row,
            signals,
        )
        trainer = StepTrainer(
            model=self.model,
            args=_arguments(settings),
            batches=Batches(
                self.windows,
                accumulate=settings.accumulate,
                eos_token_id=None if settings.join else self.tokenizer.eos_token_id,
                first_step=self.progress.step,
            ),
            rate=lambda step: learning_rate(budget.spent(step), settings.warmup, settings.schedule),
            after_step=self.after_step,
            seed=settings.seed,
            carry=settings.carry_state,
        )
        # What they print is in the metrics.
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        return trainer

    def finish(self, trainer: StepTrainer) -> Summary:
        """Save the model and, unless the run was stopped, measure it."""
        weights = self._best_weights() if self._takes_best() else trainer.weights()
        model = with_weights(self.config, weights)
        if rank() == 0:
            save_model(model, self.folder)
        if self.after_step.stopped_by:
            barrier()
            raise Stopped(signal.Signals(self.after_step.stopped_by), self.progress.step, self.folder)
        summary = self._measure(model) if rank() == 0 else None
        return _tell_all(summary)

    def _takes_best(self) -> bool:
        return self.settings.patience is not None and not self.after_step.stopped_by

    def _best_weights(self) -> dict[str, torch.Tensor]:
        barrier()  # the first process may still be writing it
        return checkpoint.load_part(self.folder / CHECKPOINTS / f"{PREFIX}{self.progress.best_step}", "model")

    def _measure(self, model: MhesaForCausalLM) -> Summary:
        plain = model.to_plain().to(self.settings.device).eval()
        held_out = self.corpus.held_out
        self.display.open("measuring", sum(len(document.data) for document in held_out))
        summary = Summary(
            folder=self.folder,
            steps=self.progress.step,
            seconds=self.progress.seconds,
            score=evaluate(plain, self.tokenizer, held_out, self.display.advance),
            compressors=compress(held_out),
            sample=write_sample(plain, self.tokenizer, self.settings.seed),
        )
        self._record(summary)
        return summary

    def _evaluate(self, trainer: StepTrainer) -> Evaluation | None:
        model = self.model
        if is_parted(model):
            model = with_weights(self.config, trainer.weights())
        if rank() != 0:
            return None
        plain = model.to_plain().eval()
        score = evaluate(plain, self.tokenizer, first_bytes(self.corpus.held_out, EVALUATED_BYTES))
        sample = write_sample(plain, self.tokenizer, self.settings.seed)
        return Evaluation(score.bits_per_byte, sample.decode("utf-8", "replace"))

    def _on_row(self, row: dict[str, Any]) -> None:
        self.display.show(row)
        if time.monotonic() - self._drawn >= SECONDS_BETWEEN_CURVES:
            self._drawn = time.monotonic()
            draw_curve(read_metrics(self.folder), {}, self.folder / CURVE)

    def _record(self, summary: Summary) -> None:
        held_out = {f"held_out_{name}": value for name, value in summary.score.as_dict().items()}
        compressors = {f"{name.split()[0]}_bits_per_byte": bits for name, bits in summary.compressors.items()}
        row = {"step": summary.steps, "seconds": round(summary.seconds, 3), COMPLETE: True}
        append_metrics(self.folder, {**row, **held_out, **compressors})
        levels = {"held out": summary.score.bits_per_byte, **summary.compressors}
        draw_curve(read_metrics(self.folder), levels, self.folder / CURVE)


def make_tokenizer(settings: TrainingSettings, source: Source) -> AnyTokenizer:
    """The tokenizer that settings name; one made of the corpus is made once.

    Raises:
        InputError: there is no such tokenizer.
    """
    size = settings.vocabulary_size()
    if settings.tokenizer == "bytes":
        return ByteTokenizer()
    if size is None:
        return open_tokenizer(settings.tokenizer)
    name = f"{source.sha256[:32]}-{size}"
    folder = cache_folder() / "vocabularies" / name
    with lock(name):
        if not folder.exists():
            with write_folder(folder) as partial:
                train_bpe(source.training_text(), size).save_pretrained(partial)
    return open_tokenizer(folder)


def _announce(console: Console, settings: TrainingSettings, corpus: Corpus, parameters: int) -> None:
    facts = corpus.facts
    documents = "1 document" if facts.documents == 1 else f"{facts.documents:,} documents"
    budget = f"{settings.steps:,} steps" if settings.steps else f"{settings.minutes:g} minutes"
    ways = "" if processes() == 1 else f", {processes()} processes"
    console.print(
        f"[bold]{facts.training_bytes:,}[/] bytes to train on from {documents}, "
        f"[bold]{facts.held_out_bytes:,}[/] held out ({settings.holdout})\n"
        f"[bold]{facts.training_tokens:,}[/] tokens ({settings.tokenizer}), "
        f"{corpus.bytes_a_token:.2f} bytes each\n"
        f"[bold]{parameters:,}[/] parameters: dim {settings.dim}, depth {settings.depth}, "
        f"{settings.heads} heads over {settings.dim_mhesa}\n"
        f"[bold]{budget}[/] on {settings.device} in {settings.precision}, "
        f"{settings.batch_size} x {settings.context} tokens a step{ways}",
        highlight=False,
    )


def _arguments(settings: TrainingSettings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(Path(settings.out) / CHECKPOINTS),
        max_steps=ENDLESS,
        per_device_train_batch_size=settings.windows_a_step // (settings.accumulate * processes()),
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.99,
        max_grad_norm=settings.clip,
        optim="adamw_torch_fused",
        bf16=settings.precision == "bf16",
        use_cpu=settings.device == "cpu",
        torch_compile=settings.compile,
        ddp_find_unused_parameters=False,
        seed=settings.seed,
        logging_strategy="no",
        save_strategy="no",
        ignore_data_skip=True,
        logging_nan_inf_filter=False,
        report_to=settings.report_to,
        project="mhesa",
        run_name=Path(settings.out).name,
        disable_tqdm=True,
        dataloader_pin_memory=settings.device != "cpu",
    )


def _recompute(model: MhesaForCausalLM) -> None:
    # transformers 5.23 calls activation_checkpointing what was gradient_checkpointing before.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def _tell_all(summary: Summary | None) -> Summary:
    """The first process's summary, in every process."""
    told = [summary]
    if processes() > 1:
        torch.distributed.broadcast_object_list(told)
    assert told[0] is not None
    return told[0]
