"""The settings of a training run, and the choices made where a setting is automatic."""

import json
import math
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from mhesa.errors import InputError
from mhesa.file_names import SETTINGS
from mhesa.model.config import DROPOUT_TEXT, ModelConfig, ModelSizes
from mhesa.settings import (
    AT_LEAST_0,
    AT_LEAST_1,
    FRACTION,
    POSITIVE,
    Doc,
    Range,
    check_ranges,
    check_types,
    documented,
    one_of,
    settings_of,
)
from mhesa.training.schedule import EPOCHS_PER_TENTH, HIGHEST_DROPOUT

# The groups of `mhesa train --help`, in their order.
RUN, TEXT, MODEL, TRAINING, MACHINE = PANELS = ("Run", "Text", "Model", "Training", "Machine")
SMALLEST_VOCABULARY = 257
LARGEST_VOCABULARY = 1_000_000
# Tokens of one step, for each process: enough that matrix products fill the device and that the fixed
# costs of a step, such as summing gradients over processes, stay small. More would only mean fewer steps
# in the same time; a CPU that computes in fp32 is slower and takes a quarter.
TOKENS_PER_STEP = {"bf16": 4096, "fp32": 1024}
TOKENS_PER_STEP_ON_ACCELERATORS = 65536
# Values of these settings for files from before they were introduced.
EARLIER_DEFAULTS = {"smoothing": "fixed", "optimizer": "adamw", "dropout": 0.0}


@documented
@dataclass(frozen=True)
class TrainingSettings(ModelSizes):
    """Everything that decides a training run.

    Raises:
        InputError: a setting of a wrong type or out of range, or two that exclude each other.
    """

    out: Annotated[str, Doc("Folder for the model, its metrics and its checkpoints.", panel=RUN)]
    sources: Annotated[
        tuple[str, ...],
        Doc(
            "Text files, folders, glob patterns, hf://owner/dataset, or - for standard input. gz, xz, zst "
            "and bz2 are unpacked; each line of jsonl and row of parquet is one document. If omitted, the "
            "source text of Python's standard library.",
            panel=TEXT,
            metavar="SOURCE",
        ),
    ] = ()
    text_field: Annotated[str, Doc("Field of jsonl and parquet that holds the text.", panel=TEXT)] = "text"
    steps: Annotated[int | None, Doc("Optimizer steps to train for.", AT_LEAST_1, RUN)] = None
    minutes: Annotated[
        float | None,
        Doc(
            "Minutes to train for in place of steps, over all parts of a resumed run; 3 if neither is given.",
            POSITIVE,
            RUN,
        ),
    ] = None
    heads: Annotated[int, Doc("Smoothing rates of a block; must divide dim_mhesa.", AT_LEAST_1, MODEL)] = (
        field(default=32, kw_only=True)
    )
    smoothing: Annotated[
        str,
        Doc(
            "adaptive lets the smoothing factors follow the text; fixed is the original model.",
            one_of("adaptive", "fixed"),
            MODEL,
        ),
    ] = "adaptive"
    conv: Annotated[
        int | None,
        Doc(
            "Taps of a short causal convolution of each block's input, 0 for none; if omitted, 4 with "
            "adaptive smoothing and 0 with fixed.",
            AT_LEAST_0,
            MODEL,
        ),
    ] = None
    context: Annotated[
        int, Doc("Tokens in a training window.", Range("at least 2", lambda value: value >= 2), TRAINING)
    ] = 256
    batch_size: Annotated[
        int | None,
        Doc(
            "Windows in a step, over all micro-batches and processes; if omitted, enough to keep every "
            "process busy.",
            AT_LEAST_1,
            TRAINING,
        ),
    ] = None
    accumulate: Annotated[
        int, Doc("Micro-batches in a step; more need less memory.", AT_LEAST_1, TRAINING)
    ] = 1
    join: Annotated[
        bool, Doc("Carry the state from one document into the next, instead of resetting it.", panel=TEXT)
    ] = False
    carry_state: Annotated[
        bool,
        Doc(
            "Start each window with the final state of the window before it in the text (truncated "
            "backpropagation through time).",
            panel=TEXT,
        ),
    ] = False
    lr: Annotated[
        float, Doc("Peak learning rate of AdamW; it warms up first and falls to a tenth.", POSITIVE, TRAINING)
    ] = 3e-3
    optimizer: Annotated[
        str,
        Doc(
            "muon for the matrices of the blocks and AdamW for the rest, or adamw alone.",
            one_of("muon", "adamw"),
            TRAINING,
        ),
    ] = "muon"
    muon_lr: Annotated[float, Doc("Peak learning rate of Muon.", POSITIVE, TRAINING)] = 0.02
    schedule: Annotated[
        str,
        Doc("How the learning rate falls: along a cosine, or (wsd) late.", one_of("cosine", "wsd"), TRAINING),
    ] = "cosine"
    warmup: Annotated[
        float, Doc("Fraction of the budget in which the learning rate rises.", FRACTION, TRAINING)
    ] = 0.02
    clip: Annotated[
        float, Doc("Maximum norm of the gradient; larger ones are scaled down to it.", POSITIVE, TRAINING)
    ] = 1.0
    weight_decay: Annotated[
        float, Doc("Weight decay of matrices; vectors have none.", AT_LEAST_0, TRAINING)
    ] = 0.1
    dropout: Annotated[
        float | None,
        Doc(
            f"{DROPOUT_TEXT}; if omitted, 0.1 for every {EPOCHS_PER_TENTH} times that the budget lets the "
            f"run read its text, at most {HIGHEST_DROPOUT}.",
            FRACTION,
            TRAINING,
        ),
    ] = None
    seed: Annotated[
        int,
        Doc(
            "Seed of the initial weights, the order of windows and dropout.",
            Range(f"from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32),
            TRAINING,
        ),
    ] = 0
    tokenizer: Annotated[
        str,
        Doc(
            "bytes; bpe:N to make N tokens of the training text; or a folder or file with a tokenizer.json.",
            panel=TEXT,
            metavar="bytes|bpe:N|PATH",
        ),
    ] = "bytes"
    holdout: Annotated[
        str,
        Doc(
            "Text kept from training to measure the model on: a fraction F chosen by content, or the last F "
            "of the text.",
            panel=TEXT,
            metavar="content:F|tail:F",
        ),
    ] = "content:0.05"
    device: Annotated[str, Doc("cpu, cuda, cuda:1, mps or xpu; auto takes the best one.", panel=MACHINE)] = (
        "auto"
    )
    precision: Annotated[
        str,
        Doc(
            "bf16 (by autocast) or fp32; auto takes bf16 where the device computes in it natively.",
            one_of("auto", "bf16", "fp32"),
            MACHINE,
        ),
    ] = "auto"
    compile: Annotated[bool, Doc("Run the model through torch.compile.", panel=MACHINE)] = False
    recompute: Annotated[
        bool, Doc("Recompute activations in the backward pass: less memory, more time.", panel=MACHINE)
    ] = False
    fsdp: Annotated[
        bool,
        Doc("Shard the weights over the processes (FSDP) instead of giving each a copy.", panel=MACHINE),
    ] = False
    context_parallel: Annotated[
        int,
        Doc(
            "Processes that share a window, each with a stretch of it; must divide their number.",
            AT_LEAST_1,
            MACHINE,
        ),
    ] = 1
    save_every: Annotated[int, Doc("Steps between checkpoints.", AT_LEAST_1, RUN)] = 200
    keep: Annotated[int, Doc("Number of checkpoints to keep.", AT_LEAST_1, RUN)] = 2
    eval_every: Annotated[
        int,
        Doc(
            "Steps between evaluations on held-out text, each with a sample; 0 evaluates only at the end.",
            AT_LEAST_0,
            RUN,
        ),
    ] = 0
    patience: Annotated[
        int | None,
        Doc(
            "Stop after this many evaluations (eval_every) without a new best, and keep the best.",
            AT_LEAST_1,
            RUN,
        ),
    ] = None
    report_to: Annotated[
        str,
        Doc("Also send the metrics to a tracker.", one_of("none", "tensorboard", "wandb", "trackio"), RUN),
    ] = "none"

    def __post_init__(self) -> None:
        if isinstance(self.sources, (list, tuple)):
            object.__setattr__(self, "sources", tuple(map(str, self.sources)))
        check_types(self)
        check_ranges(self)
        if not self.out:
            raise InputError("out must name a folder")
        if self.steps is not None and self.minutes is not None:
            raise InputError("give steps or minutes as the budget, not both")
        if self.patience is not None and not self.eval_every:
            raise InputError("patience counts evaluations: also give eval_every, the steps between them")
        if self.context < self.context_parallel:
            raise InputError(
                f"context {self.context} is shorter than context_parallel {self.context_parallel}, and each "
                "process needs a token; make context larger or context_parallel smaller"
            )
        if self.compile and self.context_parallel > 1:
            raise InputError("compile cannot be used with context_parallel; leave one of them out")
        # What this machine lacks, `resolve` refuses: a run may be resumed on another one.
        if self.tokenizer.startswith("bpe:"):
            self.vocabulary_size()
        self.model_config(vocab_size=1)
        from mhesa.data.holdout import Holdout

        Holdout.parse(self.holdout)

    def vocabulary_size(self) -> int | None:
        """The N of `bpe:N`; `None` for a tokenizer that exists already.

        Raises:
            InputError: there is no such tokenizer, or N is out of range.
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
        # Python refuses to read very long numbers.
        if (
            not (size.isdecimal() and len(size) < 20)
            or not SMALLEST_VOCABULARY <= int(size) <= LARGEST_VOCABULARY
        ):
            raise InputError(
                f"bpe:N needs N from {SMALLEST_VOCABULARY} (256 bytes and end of text) "
                f"to {LARGEST_VOCABULARY:,}, not {size}"
            )
        return int(size)

    def model_config(self, vocab_size: int, eos_token_id: int | None = None) -> ModelConfig:
        """The configuration of the model to train."""
        sizes = {field.name: getattr(self, field.name) for field in fields(ModelSizes)}
        adaptive = self.smoothing == "adaptive"
        conv_size = (4 if adaptive else 0) if self.conv is None else self.conv
        return ModelConfig(
            num_tokens=vocab_size,
            eos_token_id=eos_token_id,
            adaptive=adaptive,
            conv_size=conv_size,
            dropout=self.dropout or 0.0,
            **sizes,
        )

    def resolve(self) -> "TrainingSettings":
        """The same settings with every automatic choice made for this machine.

        Raises:
            InputError: this machine cannot do what a setting asks for, or `batch_size` does not divide
                among the processes and their micro-batches.
        """
        import torch

        from mhesa.ops.devices import check_serves, computes_in_bf16, resolve_device
        from mhesa.processes import processes

        device = resolve_device(self.device)
        kind = torch.device(device).type
        precision = self.precision
        if precision == "auto":
            precision = "bf16" if computes_in_bf16(kind) else "fp32"
        check_serves(self.backend, device, fixed_rates=self.smoothing != "adaptive")
        if self.compile and kind == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
            raise InputError("compile needs a C++ compiler on a CPU; install one or leave it out")
        if self.report_to != "none" and find_spec(self.report_to) is None:
            raise InputError(f"report_to {self.report_to} needs it installed: pip install {self.report_to}")
        if processes() % self.context_parallel:
            raise InputError(
                f"context_parallel {self.context_parallel} does not divide the number of processes, "
                f"{processes()}; start a multiple of it with torchrun, or give another"
            )
        groups = processes() // self.context_parallel
        micro_batches = self.accumulate * groups
        if (self.batch_size or micro_batches) % micro_batches:
            among = "" if processes() == 1 else f" for {processes()} processes"
            if self.context_parallel > 1:
                among += f" in groups of {self.context_parallel}"
            raise InputError(
                f"batch_size {self.batch_size} cannot be divided into {self.accumulate} micro-batches"
                f"{among}; give a multiple of {micro_batches}"
            )
        tokens = TOKENS_PER_STEP[precision] if kind == "cpu" else TOKENS_PER_STEP_ON_ACCELERATORS
        windows = max(tokens * self.context_parallel // self.context, 1)
        return replace(
            self,
            device=device,
            precision=precision,
            batch_size=self.batch_size or math.ceil(windows / self.accumulate) * micro_batches,
            minutes=3.0 if self.steps is None and self.minutes is None else self.minutes,
        )

    @property
    def windows_per_step(self) -> int:
        """The batch size of resolved settings."""
        assert self.batch_size is not None, "only resolved settings have a batch size"
        return self.batch_size

    def save(self, path: Path, **facts: dict[str, Any]) -> None:
        """Write a JSON file of the settings, with other facts of the run beside them."""
        from mhesa.atomic_io import write_file

        with write_file(path) as file:
            file.write(json.dumps({"settings": asdict(self), **facts}, indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> "TrainingSettings":
        """Read settings that `save` wrote.

        Raises:
            InputError: the file is missing or holds something else.
        """
        from mhesa.atomic_io import read_json

        if not path.is_file():
            raise InputError(f"{path.parent} holds no training run: it has no {path.name}")
        try:
            values = read_json(path)["settings"]
            unknown = set(values) - {field.name for field in fields(cls)}
            if unknown:
                raise InputError(f"{path} holds unknown settings: {', '.join(sorted(unknown))}")
            return cls(**{**EARLIER_DEFAULTS, **values})
        except (TypeError, KeyError) as error:
            raise InputError(f"{path} does not hold the settings of a training run") from error
        except ValueError as error:
            raise InputError(f"{path} does not hold the settings of a training run: {error}") from error

    @classmethod
    def resumed(cls, changes: dict[str, Any]) -> "TrainingSettings":
        """The settings of the run in `changes["out"]`, with these changes; steps replace minutes and back.

        Raises:
            InputError: the folder holds no run, or a changed setting is invalid.
        """
        path = Path(changes["out"]) / SETTINGS
        if not path.exists():
            raise InputError(f"nothing to resume: {changes['out']} holds no run")
        return replace(cls.load(path), **with_changes({}, changes))


def with_changes(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes; steps replace minutes, and minutes steps.

    >>> with_changes({"minutes": 3.0, "dim": 64}, {"steps": 100})
    {'minutes': None, 'dim': 64, 'steps': 100}
    """
    budget = {"steps": None, "minutes": None}
    return settings | ({} if changes.keys().isdisjoint(budget) else budget) | changes


# All settings in the order of `mhesa train --help`.
BY_PANEL = sorted(settings_of(TrainingSettings), key=lambda setting: PANELS.index(setting.doc.panel))
