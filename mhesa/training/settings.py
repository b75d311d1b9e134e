"""What a training run is asked to do, and what was chosen where nothing was asked."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from mhesa.data import Holdout
from mhesa.devices import best_device, check_device, check_serves, computes_in_bf16
from mhesa.errors import InputError
from mhesa.hf.configuration import MhesaConfig

SETTINGS = "settings.json"
PRECISIONS = ("auto", "bf16", "fp32")
TOKENIZERS = ("bytes",)
# Enough tokens a step to keep the processor's matrix products busy.
TOKENS_A_STEP = {"cpu": 4096}
TOKENS_A_STEP_ON_ACCELERATORS = 65536


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides a training run.

    Args:
        out: folder for the model, its metrics and its checkpoints.
        sources: text files, folders, patterns, `-`; none is the Python standard library's source text.
        steps: optimizer steps to train for.
        minutes: or how long to train for; 3 if neither is given.
        dim, depth, heads, dim_mhesa, dim_expansion_factor: the model, see `GatedExponentialSmoothingLM`.
        context: tokens a training window.
        batch_size: windows a step; enough to keep the device busy if omitted.
        lr: peak learning rate; it warms up over the first `warmup` of the budget and falls along a
            cosine to a tenth.
        warmup: that part of the budget.
        weight_decay: on matrices; vectors have none.
        seed: of the initial values and of the order of the windows.
        tokenizer: `bytes`.
        holdout: what is kept from training to measure the model on, see `mhesa.data.Holdout`.
        device: a torch device; the best one here if `auto`.
        precision: `bf16` (autocast), `fp32`, or `auto`: bf16 where the device computes in it natively.
        backend: the operator's backend; the best one if omitted.
        save_every: steps between checkpoints.

    Raises:
        InputError: a value that cannot be.
    """

    out: str
    sources: tuple[str, ...] = ()
    steps: int | None = None
    minutes: float | None = None
    dim: int = 128
    depth: int = 4
    heads: int = 8
    dim_mhesa: int = 256
    dim_expansion_factor: float = 4.0
    context: int = 256
    batch_size: int | None = None
    lr: float = 3e-3
    warmup: float = 0.02
    weight_decay: float = 0.1
    seed: int = 0
    tokenizer: str = "bytes"
    holdout: str = "content:0.05"
    device: str = "auto"
    precision: str = "auto"
    backend: str | None = None
    save_every: int = 200

    def __post_init__(self) -> None:
        if not self.out:
            raise InputError("out must name a folder")
        if self.steps is not None and self.minutes is not None:
            raise InputError("give steps or minutes as the budget, not both")
        sizes = ("dim", "depth", "heads", "dim_mhesa")
        for name in (*sizes, "steps", "context", "batch_size", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        for name in ("minutes", "lr"):
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
        _check_choice("tokenizer", self.tokenizer, TOKENIZERS)
        if self.device != "auto":
            check_device(self.device)
        Holdout.parse(self.holdout)
        try:
            self.model_config(vocab_size=1)
        except ValueError as error:
            raise InputError(str(error)) from error

    def model_config(self, vocab_size: int) -> MhesaConfig:
        """The configuration of the model to train."""
        return MhesaConfig(
            vocab_size=vocab_size,
            hidden_size=self.dim,
            num_hidden_layers=self.depth,
            heads=self.heads,
            dim_mhesa=self.dim_mhesa,
            dim_expansion_factor=self.dim_expansion_factor,
            backend=self.backend,
        )

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
        tokens = TOKENS_A_STEP.get(kind, TOKENS_A_STEP_ON_ACCELERATORS)
        return replace(
            self,
            device=device,
            precision=precision,
            batch_size=self.batch_size or max(tokens // self.context, 1),
            minutes=3.0 if self.steps is None and self.minutes is None else self.minutes,
        )

    @property
    def windows_a_step(self) -> int:
        """The batch size of resolved settings."""
        assert self.batch_size is not None, "only resolved settings have a batch size"
        return self.batch_size

    def save(self, path: Path, **facts: dict[str, Any]) -> None:
        """Write the settings as JSON, and under their names other facts of the run."""
        path.write_text(json.dumps({"settings": asdict(self), **facts}, indent=2) + "\n")

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
        except (OSError, ValueError, TypeError, KeyError) as error:
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
