"""A saved model's folder: what is in it, and loading it without surprises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from mhesa.devices import check_device, check_serves
from mhesa.errors import InputError
from mhesa.hf.configuration import MhesaConfig
from mhesa.hf.modeling import MhesaForCausalLM
from mhesa.hf.tokenization import ByteTokenizer
from mhesa.hf.vocabulary import TOKENIZER, TOKENIZER_CONFIG, TextTokenizer, open_tokenizer
from mhesa.model import GatedExponentialSmoothingLM

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def load(
    folder: str | Path, *, device: str = "cpu", backend: str | None = None
) -> tuple[GatedExponentialSmoothingLM, ByteTokenizer | TextTokenizer]:
    """Load the plain model, in evaluation mode, and the tokenizer that `save_pretrained` wrote.

    Reads safetensors and JSON only, nothing from the network, and no code.

    Args:
        folder: where `config.json`, `model.safetensors` and the tokenizer's files are.
        device: a torch device to put the model on.
        backend: the operator's backend, `None` for the best one.

    Raises:
        InputError: the folder is missing or holds no whole model of this kind; the message names the
            file. Or the device is not on this machine,
            or the backend does not serve it.
    """
    check_device(device)
    check_serves(backend, device)
    folder = Path(folder)
    _check_config(folder)
    _check_weights(folder / WEIGHTS)
    try:
        config = MhesaConfig.from_pretrained(folder, backend=backend)
        model, report = cast(
            tuple[MhesaForCausalLM, dict[str, Any]],
            MhesaForCausalLM.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            ),
        )
    except ValueError as error:
        raise InputError(f"{folder / CONFIG} does not describe a model: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            first, *others = sorted(str(name) for name in report[problem])
            raise InputError(
                f"{folder / WEIGHTS} does not fit {CONFIG}: {problem.replace('_', ' ')}: {first}"
                + (f" and {len(others)} more" if others else "")
            )
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer in {folder} has {len(tokenizer):,} tokens and the model {config.vocab_size:,}"
        )
    return model.to_plain().to(device).eval(), tokenizer


def load_tokenizer(folder: Path) -> ByteTokenizer | TextTokenizer:
    """The tokenizer in a model's folder; bytes if there is none.

    Raises:
        InputError: it is damaged, or of another kind.
    """
    if (folder / TOKENIZER).exists() or (folder / TOKENIZER_CONFIG).exists():
        return open_tokenizer(folder)
    return ByteTokenizer()


def _check_config(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not a model's folder: it has no {CONFIG}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is broken: {error}") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != MhesaConfig.model_type:
        raise InputError(f"{folder} holds a model of type {kind}, not {MhesaConfig.model_type}")


def _check_weights(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path.parent} is not a whole model: it has no {path.name}")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is broken: {error}") from error
