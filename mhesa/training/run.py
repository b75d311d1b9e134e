"""A training run, from settings to a folder with a model in it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors import SafetensorError
from torch.profiler import record_function

from mhesa.data.cache import cached_folder
from mhesa.data.corpus import Corpus, Source, open_corpus
from mhesa.data.files import Document
from mhesa.data.windows import Windows
from mhesa.errors import NOT_NUMBERS, InputError, TrainingError, reason
from mhesa.file_names import CHECKPOINTS, CURVE
from mhesa.inference.evaluation import PredictionCost, evaluate
from mhesa.inference.parallel_decoder import ParallelDecoder
from mhesa.model.config import ModelConfig
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.model.loading import load_tokenizer, plain_name, save
from mhesa.ops.devices import resolve_device
from mhesa.processes import (
    all_or_none,
    barrier,
    broadcast,
    check_same,
    expect_processes,
    join_processes,
    processes,
    rank,
    total,
)
from mhesa.terminal import say
from mhesa.tokenizers import Bytes, TextTokenizer, open_tokenizer, train_bpe
from mhesa.training import checkpoint
from mhesa.training.batches import Batches
from mhesa.training.busy_cores import BusyCores
from mhesa.training.checkpoint import PREFIX, Progress
from mhesa.training.distributed import StateDict, arrange, is_sharded, model_state
from mhesa.training.folder import (
    COMPLETE,
    append_metrics,
    check_free,
    check_inputs,
    check_same_corpus,
    checkpoint_to_resume,
    only_run_in,
    prepare,
    read_metrics,
)
from mhesa.training.loop import Phase, train_model
from mhesa.training.memory import check_memory
from mhesa.training.metrics import Evaluation, Row
from mhesa.training.outcome import Summary, compress, first_bytes, write_sample
from mhesa.training.plot import draw_curve
from mhesa.training.progress import ProgressDisplay
from mhesa.training.reports import Report, reporter
from mhesa.training.schedule import Budget, StopOnSignal
from mhesa.training.settings import TrainingSettings

SECONDS_BETWEEN_CURVES = 60.0
# Evaluations during training read so much of the held-out text.
EVALUATED_BYTES = 1 << 17
# Texts of so many bytes are read by all processes together.
SHARED_BYTES = 1 << 20


class Stopped(Exception):  # noqa: N818 - what was asked for, not an error
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
    phase: Phase = record_function,
) -> Summary:
    """Train a model on text, save it with all that belongs to it, and measure it on text held out.

    Run by `torchrun` or `accelerate launch`, every process calls this, and the first one writes.

    Args:
        settings: settings of the run.
        resume: continue from the newest undamaged checkpoint in `settings.out`.
        overwrite: replace the run that `settings.out` holds.
        console: where progress is shown; nowhere if omitted.
        phase: see `mhesa.training.loop.train_model`; by default it names parts for torch's profiler.

    Raises:
        InputError: a source, a setting or the folder cannot be used; nothing was written then.
        TrainingError: the loss became NaN or infinite, or a checkpoint could not be written.
        Stopped: SIGINT or SIGTERM came; the folder holds a model and a checkpoint of the last step.
    """
    join_processes(resolve_device(settings.device))
    console = console if console is not None and rank() == 0 else Console(quiet=True)
    # Gradients are on, whatever they are outside.
    with (
        expect_processes(partial(checkpoint.remedy, Path(settings.out) / CHECKPOINTS)),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        with all_or_none():
            settings = settings.resolve()
        with only_run_in(Path(settings.out)):
            return _finish(begin(settings, resume, overwrite, console), phase)


def _finish(run: Run, phase: Phase) -> Summary:
    """Train to the end, and say what stopped it in the words of `train`."""
    device = torch.device(run.settings.device)
    with (
        # Leave torch's global generators as they were.
        torch.random.fork_rng([device] if device.type in ("cuda", "xpu") else [], device_type=device.type),
        StopOnSignal() as signals,
        run.display,
        reporter(run.settings) as report,
    ):
        try:
            return run.train(signals, report, phase)
        except FloatingPointError as error:
            raise TrainingError(f"{error}; start over with a lower learning rate") from error
        except (OSError, SafetensorError) as error:
            how = checkpoint.remedy(run.folder / CHECKPOINTS)
            raise TrainingError(f"cannot write to {run.folder}: {reason(error)}; {how}") from error


def begin(settings: TrainingSettings, resume: bool, overwrite: bool, console: Console) -> Run:
    """Check everything that can be wrong, in every process, and only then touch the folder."""
    with all_or_none():
        run = _prepared(settings, resume, overwrite, console)
    facts = asdict(settings) | {"text": run.corpus.facts.sha256}
    # Text may be at another place, and every process has a device of its own.
    check_same({name: value for name, value in facts.items() if name not in ("sources", "device")})
    if rank() == 0:
        done = None if run.start is None else checkpoint.load_progress(run.start).step
        prepare(run.folder, settings, asdict(run.corpus.facts), done)
        run.tokenizer.save_pretrained(run.folder)
    barrier()
    run.announce(console)
    return run


def _prepared(settings: TrainingSettings, resume: bool, overwrite: bool, console: Console) -> Run:
    """A run whose settings are checked and whose text is tokenised."""
    if resume and overwrite:
        raise InputError("give resume or overwrite, not both")
    folder = Path(settings.out)
    start = checkpoint_to_resume(settings, console) if resume else None
    if not resume and not overwrite and rank() == 0:
        check_free(folder)
    if "-" in settings.sources and processes() > 1:
        raise InputError("many processes cannot share standard input; give a file")
    if not resume:
        # Before all of the text is read. A resumed run has its tokenizer in its folder.
        settings.vocabulary_size()
    source = Source(settings.sources, text_field=settings.text_field, holdout=settings.holdout)
    if resume:
        check_same_corpus(folder, source.sha256)
    else:
        named = Path(settings.tokenizer)
        inputs: list[Path | int] = [*(file.path for file in source.files), named, *named.glob("*")]
        check_inputs(folder, [*inputs, 0] if "-" in settings.sources else inputs)
    display = ProgressDisplay(console, Budget(settings.steps, settings.minutes))
    with display:
        tokenizer = load_tokenizer(folder) if resume else make_tokenizer(settings, source)
        display.open("tokenising", max(source.size, 1))
        corpus = open_corpus(source, tokenizer, display.advance)
        display.close()
    windows = Windows(
        corpus.tokens,
        context=settings.context,
        rows=settings.windows_per_step,
        seed=settings.seed,
        streams=settings.carry_state,
    )
    check_memory(settings, len(tokenizer))
    config = settings.model_config(len(tokenizer), tokenizer.eos_token_id)
    return Run(settings, config, folder, tokenizer, corpus, windows, start, display)


@dataclass
class Run:
    """A run that is ready to train: its settings checked, its text tokenised."""

    settings: TrainingSettings
    config: ModelConfig
    folder: Path
    tokenizer: Bytes | TextTokenizer
    corpus: Corpus
    windows: Windows
    start: Path | None
    display: ProgressDisplay
    drawn_at: float = field(default_factory=time.monotonic)

    def announce(self, console: Console) -> None:
        """Tell what is going to be trained on what."""
        settings, facts = self.settings, self.corpus.facts
        documents = _count(facts.documents, "document")
        budget = _count(settings.steps, "step") if settings.steps else _count(settings.minutes or 0, "minute")
        shared = "" if processes() == 1 else f", {processes()} processes"
        if settings.context_parallel > 1:
            shared += f", {settings.context_parallel} to a window"
        often = ""
        if settings.steps is not None:
            epochs = self.windows.epochs(settings.steps)
            often = f", the text {epochs:,.1f} times" if epochs >= 1 else f", {epochs:.2g} of the text"
        say(
            console,
            f"{facts.training_bytes:,} bytes to train on from {documents}, "
            f"{facts.held_out_bytes:,} held out ({settings.holdout})\n"
            f"{facts.training_tokens:,} tokens ({settings.tokenizer}), "
            f"{self.corpus.bytes_per_token:.2f} bytes each\n"
            f"{self.config.parameters:,} parameters: dim {settings.dim}, depth {settings.depth}, "
            f"{settings.heads} heads over {settings.dim_mhesa}\n"
            f"{budget} on {settings.device} in {settings.precision}, "
            f"{settings.batch_size} x {settings.context} tokens a step{shared}{often}",
        )
        if self.start is not None:
            step = int(self.start.name.removeprefix(PREFIX))
            say(console, f"goes on from step {step:,}")

    def train(self, signals: StopOnSignal, report: Report, phase: Phase) -> Summary:
        """Train, save the model and, unless a signal came, measure it."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        model = self.config.build()
        batches = Batches(
            self.windows,
            accumulate=settings.accumulate,
            eos_token_id=None if settings.join else self.tokenizer.eos_token_id,
            device=settings.device,
            grid=arrange(settings.device, settings.context_parallel),
        )
        self.display.open("training", 1.0)
        progress, stopped_by = train_model(
            model,
            settings,
            batches,
            bytes_per_token=self.corpus.bytes_per_token,
            start=self.start,
            budget=self.display.budget,
            signals=signals,
            evaluate=self._evaluate,
            on_row=partial(self._write_row, report, BusyCores(settings.device)),
            phase=phase,
        )
        if settings.patience is not None and progress.best_step is not None and not stopped_by:
            model = self._saved(progress.best_step)
            best = f"The best model on text held out, that of step {progress.best_step:,}, is kept."
            say(self.display.console, best)
        whole = self._whole(model)
        if rank() == 0:
            save(whole, self.tokenizer, self.folder)
        if stopped_by:
            barrier()
            raise Stopped(signal.Signals(stopped_by), progress.step, self.folder)
        held_out = self.corpus.held_out
        self.display.open("measuring", sum(len(document.data) for document in held_out))
        score = self._score(model, whole, held_out, self.display.advance)
        return broadcast(self._summary(whole, progress, score) if score is not None else None)

    def _write_row(self, report: Report, cores: BusyCores, row: Row) -> None:
        """Save a row of metrics, show and report it, and now and then draw the curve."""
        append_metrics(self.folder, row)
        self.display.show(row)
        if hint := cores.hint():
            say(self.display.console, hint, style="yellow")
        report(row["step"], {name: value for name, value in row.items() if isinstance(value, float)})
        if time.monotonic() - self.drawn_at >= SECONDS_BETWEEN_CURVES:
            self.drawn_at = time.monotonic()
            draw_curve(read_metrics(self.folder), {}, self.folder / CURVE)

    def _whole(self, model: GatedExponentialSmoothingLM) -> GatedExponentialSmoothingLM:
        """The whole model, in the first process. All processes must call this, as each may hold a shard."""
        return self._with_weights(model_state(model)) if is_sharded(model) else model.eval()

    def _score(
        self,
        model: GatedExponentialSmoothingLM,
        whole: GatedExponentialSmoothingLM,
        documents: list[Document],
        on_progress: Callable[[int], object] = lambda tokens: None,
    ) -> PredictionCost | None:
        """The cost of a model's predictions, in the first process; `None` in the others.

        Several processes share long texts, or all of them if `model` is sharded; others are dealt out.
        """
        if processes() == 1:
            return evaluate(whole, self.tokenizer, documents, on_progress)
        assert dist.group.WORLD is not None
        shortest = 0 if self.settings.context_parallel > 1 or is_sharded(model) else SHARED_BYTES
        shared = [document for document in documents if len(document.data) >= shortest]
        dealt = [document for document in documents if len(document.data) < shortest][rank() :: processes()]
        decoder = ParallelDecoder(model.eval(), dist.group.WORLD)
        score = evaluate(decoder, self.tokenizer, shared, on_progress)
        try:
            own = evaluate(model, self.tokenizer, dealt, on_progress) if dealt else PredictionCost(0.0, 0, 0)
        except FloatingPointError:
            # All processes must know.
            own = PredictionCost(math.nan, 0, 0)
        nats, tokens, size = total([own.nats, own.tokens, own.bytes])
        if math.isnan(nats):
            raise FloatingPointError(NOT_NUMBERS)
        return score + PredictionCost(nats, int(tokens), int(size)) if rank() == 0 else None

    def _saved(self, step: int) -> GatedExponentialSmoothingLM:
        """The model as it was saved after `step`."""
        barrier()  # until the first process has written it
        weights = checkpoint.load_part(self.folder / CHECKPOINTS / f"{PREFIX}{step}", "model")
        return self._with_weights({plain_name(name): weight for name, weight in weights.items()})

    def _with_weights(self, weights: StateDict) -> GatedExponentialSmoothingLM:
        model = self.config.empty()
        if weights:
            model.load_state_dict(weights, assign=True)
            model.to(self.settings.device)
        return model.eval()

    def _summary(
        self, model: GatedExponentialSmoothingLM, progress: Progress, score: PredictionCost
    ) -> Summary:
        """Write the results of the run beside its model."""
        summary = Summary(
            folder=self.folder,
            steps=progress.step,
            seconds=progress.seconds,
            score=score,
            compressors=compress(self.corpus.held_out),
            sample=write_sample(model, self.tokenizer, self.settings.seed),
        )
        figures = {f"held_out_{name}": value for name, value in summary.score.as_dict().items()}
        figures |= {f"{name.split()[0]}_bits_per_byte": bits for name, bits in summary.compressors.items()}
        row = {"step": summary.steps, "seconds": round(summary.seconds, 3), COMPLETE: True}
        append_metrics(self.folder, row | figures)
        levels = {"held out": summary.score.bits_per_byte, **summary.compressors}
        draw_curve(read_metrics(self.folder), levels, self.folder / CURVE)
        return summary

    def _evaluate(self, model: GatedExponentialSmoothingLM) -> Evaluation | None:
        whole = self._whole(model)
        try:
            score = self._score(model, whole, first_bytes(self.corpus.held_out, EVALUATED_BYTES))
            if score is None:
                return None
            sample = write_sample(whole, self.tokenizer, self.settings.seed)
        except FloatingPointError:
            # Reported as a result, so that all processes see that the last step broke the weights.
            return Evaluation(math.inf, "")
        return Evaluation(score.bits_per_byte, sample.decode("utf-8", "replace"))


def make_tokenizer(settings: TrainingSettings, source: Source) -> Bytes | TextTokenizer:
    """The tokenizer that settings name; one made of the corpus is made once, and cached.

    Raises:
        InputError: there is no such tokenizer.
    """
    size = settings.vocabulary_size()
    if settings.tokenizer == "bytes":
        return Bytes()
    if size is None:
        return open_tokenizer(settings.tokenizer)
    name = f"vocabularies/{source.sha256[:32]}-{size}-padding"
    return open_tokenizer(
        cached_folder(name, lambda folder: train_bpe(source.training_text(), size).save_pretrained(folder))
    )


def _count(number: float, noun: str) -> str:
    return f"{number:,.12g} {noun}{'' if number == 1 else 's'}"
