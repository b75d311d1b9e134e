"""What a training run is asked to do, and what was chosen where nothing was asked."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mhesa.atomic_io import write_file
from mhesa.data import Holdout
from mhesa.errors import InputError
from mhesa.model.config import BlockConfig, ModelConfig
from mhesa.ops.devices import best_device, check_device, check_serves, computes_in_bf16
from mhesa.training.distributed import processes
from mhesa.training.schedule import SCHEDULES

SETTINGS = "settings.json"
PRECISIONS = ("auto", "bf16", "fp32")
REPORTERS = ("none", "tensorboard", "wandb", "trackio")
SMALLEST_VOCABULARY = 257
LARGEST_VOCABULARY = 1_000_000
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "tuple[str, ...]": ((tuple,), "a list of texts"),
}
# Enough tokens a step to keep a process's matrix products busy, and what a step costs beside them small, the
# sum of gradients over processes included. More would only make fewer steps of the same time: a CPU that
# computes in fp32 takes a quarter.
TOKENS_A_STEP = {"bf16": 4096, "fp32": 1024}
TOKENS_A_STEP_ON_ACCELERATORS = 65536


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides a training run.

    Args:
        out: folder for the model, its metrics and its checkpoints.
        sources: see `mhesa.data.sources.find_files`; none is the Python standard library's source text.
        text_field: the field of JSON lines and the column of parquet that holds the text.
        steps: optimizer steps to train for.
        minutes: or how long to train for; 3 if neither is given.
        dim, depth, heads, dim_mhesa, dim_expansion_factor: the model, see `GatedExponentialSmoothingLM`.
        dropout: how often, in training, an element of a block's gated product and output is 0.
        context: tokens a training window.
        batch_size: windows a step, in all micro-batches and processes together; enough to keep every
            process busy if omitted.
        accumulate: micro-batches a step.
        join: let the state run on from one document into the next; they are packed apart otherwise.
        carry_state: let windows follow one another in streams, each beginning with the state of the
            window before it (truncated backpropagation through time).
        lr: peak learning rate; it warms up over the first `warmup` of the budget and falls to a tenth.
        schedule: how it falls: `cosine`, or `wsd`, late.
        warmup: that part of the budget.
        clip: the largest norm of the gradient; it is scaled down to that.
        weight_decay: on matrices; vectors have none.
        seed: of the initial values, of the order of the windows and of dropout.
        tokenizer: `bytes`, `bpe:N` for N tokens made of the corpus, or where a `tokenizer.json` is.
        holdout: what is kept from training to measure the model on, see `mhesa.data.Holdout`.
        device: a torch device; the best one here if `auto`.
        precision: `bf16` (autocast), `fp32`, or `auto`: bf16 where the device computes in it natively.
        backend: the operator's backend; the best one if omitted.
        compile: run the model through `torch.compile`.
        recompute: keep a block's input alone and compute the rest again for the backward pass, for less
            memory.
        fsdp: part weights among processes (`fully_shard`), where there are many; they hold copies
            otherwise.
        save_every: steps between checkpoints.
        keep: how many checkpoints to keep.
        eval_every: steps between evaluations on text held out; 0 measures at the end alone.
        patience: stop after so many evaluations without a better one, and take the best.
        report_to: also send figures to `tensorboard`, `wandb` or `trackio`.

    Raises:
        InputError: a value that cannot be.
    """

    out: str
    sources: tuple[str, ...] = ()
    text_field: str = "text"
    steps: int | None = None
    minutes: float | None = None
    dim: int = 128
    depth: int = 4
    heads: int = 8
    dim_mhesa: int = 256
    dim_expansion_factor: float = 4.0
    dropout: float = 0.0
    context: int = 256
    batch_size: int | None = None
    accumulate: int = 1
    join: bool = False
    carry_state: bool = False
    lr: float = 3e-3
    schedule: str = "cosine"
    warmup: float = 0.02
    clip: float = 1.0
    weight_decay: float = 0.1
    seed: int = 0
    tokenizer: str = "bytes"
    holdout: str = "content:0.05"
    device: str = "auto"
    precision: str = "auto"
    backend: str | None = None
    compile: bool = False
    recompute: bool = False
    fsdp: bool = False
    save_every: int = 200
    keep: int = 2
    eval_every: int = 0
    patience: int | None = None
    report_to: str = "none"

    def __post_init__(self) -> None:
        self._check_types()
        if not self.out:
            raise InputError("out must name a folder")
        if self.steps is not None and self.minutes is not None:
            raise InputError("give steps or minutes as the budget, not both")
        sizes = ("dim", "depth", "heads", "dim_mhesa")
        counts = ("steps", "context", "batch_size", "accumulate", "save_every", "keep", "patience")
        for name in (*sizes, *counts):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        for name in ("minutes", "lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be a positive number, not {value}")
        if self.context < 2:
            raise InputError("context must be at least 2: a window of one token has nothing to predict")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup must be at least 0 and below 1, not {self.warmup}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be 0 or more, not {self.weight_decay}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("report_to", self.report_to, REPORTERS)
        if self.eval_every < 0:
            raise InputError(f"eval_every must be 0 or more, not {self.eval_every}")
        if self.patience is not None and not self.eval_every:
            raise InputError("patience counts evaluations; say with eval_every how often there is one")
        self.vocabulary_size()
        if self.device != "auto":
            check_device(self.device)
        Holdout.parse(self.holdout)
        try:
            self.model_config(vocab_size=1)
        except ValueError as error:
            raise InputError(str(error)) from error

    def _check_types(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if value is None and kind.endswith("| None"):
                continue
            accepted, words = KINDS[kind.removesuffix(" | None")]
            if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
                raise InputError(f"{field.name} must be {words}, not {value!r}")

    def vocabulary_size(self) -> int | None:
        """How many tokens to make of the corpus, `None` for a tokenizer that is there.

        Raises:
            InputError: a tokenizer that cannot be.
        """
        if self.tokenizer == "bytes":
            return None
        if not self.tokenizer.startswith("bpe:"):
            if not Path(self.tokenizer).exists():
                raise InputError(
                    "tokenizer must be bytes, bpe:N, or a folder or file with a tokenizer.json, "
                    f"not {self.tokenizer}"
                )
            return None
        size = self.tokenizer.removeprefix("bpe:")
        if not size.isdecimal() or not SMALLEST_VOCABULARY <= int(size) <= LARGEST_VOCABULARY:
            raise InputError(
                f"bpe:N needs N from {SMALLEST_VOCABULARY} (256 bytes and end of text) "
                f"to {LARGEST_VOCABULARY:,}, not {size}"
            )
        return int(size)

    def model_config(self, vocab_size: int, eos_token_id: int | None = None) -> ModelConfig:
        """The sizes of the model to train."""
        sizes = {field.name: getattr(self, field.name) for field in fields(BlockConfig)}
        return ModelConfig(num_tokens=vocab_size, eos_token_id=eos_token_id, **sizes)

    def resolve(self) -> TrainingSettings:
        """The same settings with every automatic choice made for this machine.

        Raises:
            InputError: the backend cannot serve the device.
        """
        device = best_device() if self.device == "auto" else self.device
        kind = torch.device(device).type
        precision = self.precision
        if precision == "auto":
            precision = "bf16" if computes_in_bf16(kind) else "fp32"
        check_serves(self.backend, device)
        if self.compile and kind == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
            raise InputError("compile needs a C++ compiler on a CPU; install one or leave it out")
        if self.report_to != "none" and find_spec(self.report_to) is None:
            raise InputError(f"report_to {self.report_to} needs it installed: pip install {self.report_to}")
        shares = self.accumulate * processes()
        if (self.batch_size or shares) % shares:
            raise InputError(
                f"batch_size {self.batch_size} cannot be parted into {self.accumulate} micro-batches "
                f"for {processes()} processes; give a multiple of {shares}"
            )
        tokens = TOKENS_A_STEP[precision] if kind == "cpu" else TOKENS_A_STEP_ON_ACCELERATORS
        return replace(
            self,
            device=device,
            precision=precision,
            batch_size=self.batch_size or self._share(max(tokens // self.context, 1)) * processes(),
            minutes=3.0 if self.steps is None and self.minutes is None else self.minutes,
        )

    @property
    def windows_a_step(self) -> int:
        """The batch size of resolved settings."""
        assert self.batch_size is not None, "only resolved settings have a batch size"
        return self.batch_size

    def _share(self, windows: int) -> int:
        """The next number of windows that a process's micro-batches can share."""
        return math.ceil(windows / self.accumulate) * self.accumulate

    def save(self, path: Path, **facts: dict[str, Any]) -> None:
        """Write the settings as JSON, and under their names other facts of the run."""
        with write_file(path) as file:
            file.write(json.dumps({"settings": asdict(self), **facts}, indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> TrainingSettings:
        """Read settings that `save` wrote.

        Raises:
            InputError: the file is not there, or holds something else.
        """
        try:
            values = json.loads(path.read_text())["settings"]
            unknown = set(values) - {field.name for field in fields(cls)}
            if unknown:
                raise InputError(f"{path} holds unknown settings: {', '.join(sorted(unknown))}")
            return cls(**{**values, "sources": tuple(values["sources"])})
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{path.parent} holds no training run: it has no {path.name}") from error
        except (TypeError, KeyError) as error:
            raise InputError(f"{path} does not hold the settings of a training run") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path} does not hold the settings of a training run: {error}") from error

    @classmethod
    def resumed(cls, changes: dict[str, Any]) -> TrainingSettings:
        """The settings of the run in `changes["out"]`, with the changes made; one budget replaces the other.

        Raises:
            InputError: the folder holds no run, or a value cannot be.
        """
        path = Path(changes["out"]) / SETTINGS
        if not path.exists():
            raise InputError(f"nothing to resume: {changes['out']} holds no run")
        if not changes.keys().isdisjoint({"steps", "minutes"}):
            changes = {"steps": None, "minutes": None} | changes
        return replace(cls.load(path), **changes)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, not {value}")
