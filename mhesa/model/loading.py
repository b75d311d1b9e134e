"""A saved model's folder: writing it, and loading it.

The folder is one that transformers' `AutoModelForCausalLM` and `AutoTokenizer` read, and may be one that
`save_pretrained` wrote; transformers itself is not needed. Torch is imported inside the functions that need
it, so that a wrong folder is reported at once.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhesa import remote_code
from mhesa.atomic_io import read_json, remove, sync, write_folder
from mhesa.errors import InputError, reason
from mhesa.file_names import (
    CHECKPOINTS,
    CONFIG,
    GENERATION_CONFIG,
    OF_TOKENIZER,
    SETTINGS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mhesa.model.config import ModelConfig
    from mhesa.model.lm import GatedExponentialSmoothingLM
    from mhesa.tokenizers import Bytes, TextTokenizer

# Where `save_pretrained` says which file holds which weight, if it wrote several.
INDEX = "model.safetensors.index.json"
# Where a model's files are complete before they are moved to their places.
STAGING = ".model"
MODEL_TYPE = "mhesa"
# Saved weights are named as in `mhesa.hf.MhesaForCausalLM`, which keeps embedding and blocks in `model`.
PREFIX = "model."
EMBEDDING, HEAD = "model.token_emb.weight", "to_logits.weight"
PRECISIONS = ("float64", "float32", "bfloat16", "float16")
# A decay near 1 is a long memory, and bf16 knows only two values between 0.99 and 1.
KEPT_IN_FP32 = ("alphas", "dampen_factors")


def save(model: GatedExponentialSmoothingLM, tokenizer: Bytes | TextTokenizer, folder: str | Path) -> None:
    """Write a model and its tokenizer for `load`, and for transformers: after `import mhesa.hf`, or with
    `trust_remote_code=True`.

    Each file is written whole or not at all; those of a model that is there are replaced or removed.

    Args:
        model: the model; its `backend` is not saved.
        tokenizer: the tokenizer that it was trained with.
        folder: folder to write to; it is made if it is not there.

    Raises:
        OSError: a file cannot be written.

    >>> import mhesa, tempfile
    >>> from mhesa.tokenizers import Bytes
    >>> model = mhesa.GatedExponentialSmoothingLM(num_tokens=257, dim=16, depth=2, heads=2, dim_mhesa=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, Bytes(), folder)
    ...     type(mhesa.load(folder)[0]).__name__
    'GatedExponentialSmoothingLM'
    """
    from safetensors.torch import save_file

    from mhesa.model.config import ModelConfig

    folder = Path(folder)
    config = replace(ModelConfig.of(model), eos_token_id=tokenizer.eos_token_id).to_json()
    config["pad_token_id"] = tokenizer.pad_token_id
    token_ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
    values = {
        **config,
        "architectures": ["MhesaForCausalLM"],
        "auto_map": remote_code.MODELS,
        "dtype": str(model.to_logits.weight.dtype).removeprefix("torch."),
        "model_type": MODEL_TYPE,
        "use_cache": True,
    }
    weights = {saved_name(name): weight.contiguous() for name, weight in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del weights[HEAD]
    with write_folder(folder / STAGING) as staging:
        tokenizer.save_pretrained(staging)
        remote_code.write_module(staging)
        (staging / CONFIG).write_text(_to_json(values))
        (staging / GENERATION_CONFIG).write_text(_to_json({"_from_model_config": True, **token_ids}))
        save_file(weights, staging / WEIGHTS, metadata={"format": "pt"})
    written = [file.name for file in (folder / STAGING).iterdir()]
    for name in written:
        (folder / STAGING / name).replace(folder / name)
    # What an earlier model had besides, and this one would be loaded with.
    for name in {*OF_TOKENIZER, INDEX}.difference(written):
        remove(folder / name)
    (folder / STAGING).rmdir()
    sync(folder)


def saved_name(name: str) -> str:
    """The name that a parameter of the plain model has in saved files.

    >>> saved_name("layers.0.to_out.bias"), saved_name("to_logits.weight")
    ('model.layers.0.to_out.bias', 'to_logits.weight')
    """
    return name if name == HEAD else PREFIX + name


def plain_name(name: str) -> str:
    """The inverse of `saved_name`."""
    return name.removeprefix(PREFIX)


def _to_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def load(
    folder: str | Path, *, device: str = "cpu", backend: str | None = None
) -> tuple[GatedExponentialSmoothingLM, Bytes | TextTokenizer]:
    """Load the plain model, in evaluation mode, and the tokenizer that `save` or `save_pretrained` wrote.

    Reads safetensors and JSON only, nothing from the network, and no code.

    Args:
        folder: where `config.json`, `model.safetensors` or its parts, and the tokenizer's files are.
        device: a torch device to put the model on.
        backend: the operator's backend, `None` for the best one.

    Raises:
        InputError: the folder is missing or holds no whole model of this kind, the device is not on this
            machine, or the backend does not serve it.
    """
    from mhesa.model.config import ModelConfig
    from mhesa.ops.devices import check_device, check_serves

    check_device(device)
    folder = Path(folder)
    values = read_config(folder)
    try:
        sizes = ModelConfig.from_json(values | {"backend": backend})
        dtype = _dtype(values)
    except ValueError as error:
        raise InputError(f"{folder / CONFIG} does not describe a model: {error}") from error
    check_serves(backend, device, fixed_rates=not sizes.adaptive)
    model = _read_weights(folder, sizes, dtype)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > sizes.num_tokens:
        raise InputError(
            f"the tokenizer in {folder} has {len(tokenizer):,} tokens and the model {sizes.num_tokens:,}"
        )
    return model.to(device).eval(), tokenizer


def load_tokenizer(folder: Path) -> Bytes | TextTokenizer:
    """The tokenizer in a model's folder; bytes if there is none.

    Raises:
        InputError: it is damaged, or of another kind.
    """
    from mhesa.tokenizers import Bytes, open_tokenizer

    if (folder / TOKENIZER).exists() or (folder / TOKENIZER_CONFIG).exists():
        return open_tokenizer(folder)
    return Bytes()


def read_config(folder: Path) -> dict[str, Any]:
    """The values in `config.json` of a model's folder.

    Raises:
        InputError: there is no such folder, it lacks a file, or it holds another kind of model.
    """
    if not folder.exists():
        raise InputError(f"no such folder: {folder}")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the folder of a trained model")
    path = folder / CONFIG
    missing = f"{folder} is not a model's folder: it has no {CONFIG}"
    # Not `Path.exists`, which raises an error where the folder may not be searched.
    if os.path.exists(folder / SETTINGS):
        has_checkpoints = any((folder / CHECKPOINTS).glob("*"))
        how = "go on with train --resume" if has_checkpoints else "start over with train --overwrite"
        what = f"the training run in {folder} has no model yet: wait for its end"
        missing = f"{what}; if it was stopped, {how} --out {folder}"
    values = read_json(path, missing)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != MODEL_TYPE:
        raise InputError(f"{folder} holds a model of type {kind}, not {MODEL_TYPE}")
    _weight_files(folder)
    return dict(values)


def _dtype(values: dict[str, Any]) -> torch.dtype | None:
    """The type that `config.json` names for the weights; `None` for that of the file."""
    import torch

    name = values.get("dtype", values.get("torch_dtype"))
    if name is None:
        return None
    if name not in PRECISIONS:
        raise InputError(f"dtype must be one of {', '.join(PRECISIONS)}, not {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _weight_files(folder: Path) -> tuple[Path, list[Path]]:
    """The file that says what weights there are, and those that hold them: one, or as many as an index says.

    Raises:
        InputError: there are none, the index is damaged, or it names a file outside of the folder.
    """
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS, [folder / WEIGHTS]
    index = folder / INDEX
    values = read_json(index, missing=f"{folder} is not a whole model: it has no {WEIGHTS}")
    try:
        names = set(values["weight_map"].values())
        whole = all(Path(name).name == name for name in names) and bool(names)
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(f"{index} is damaged: it must name a file of this folder for each weight")
    return index, [folder / name for name in sorted(names)]


def _read_weights(folder: Path, sizes: ModelConfig, dtype: torch.dtype | None) -> GatedExponentialSmoothingLM:
    import torch
    from safetensors import SafetensorError, safe_open

    where, files = _weight_files(folder)
    for path in files:
        try:
            path.open("rb").close()
        except PermissionError as error:
            raise InputError(f"cannot read {path}: {reason(error)}") from error
        except OSError as error:
            raise InputError(f"{where} is damaged: {reason(error)}: {path}") from error
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
            places = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 no mapping
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in places.items()}
            model = _empty(where, shapes, sum(path.stat().st_size for path in files), sizes)
            weights = {name: file.get_tensor(name) for name, file in places.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{where} is damaged: {error}") from error
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise InputError(f"{where} is damaged: {name} is of type {weight.dtype}, which no weight can be")
    if dtype is None:
        dtype = next((weight.dtype for weight in weights.values()), torch.float32)
    state = {plain_name(name): _copy(name, weight, dtype) for name, weight in weights.items()}
    for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        if name not in weights:
            state[plain_name(name)] = state[plain_name(other)]
    model.load_state_dict(state, assign=True)
    if sizes.tie_word_embeddings and torch.equal(model.to_logits.weight, model.token_emb.weight):
        model.to_logits.weight = model.token_emb.weight
    return model


def _empty(
    path: Path, found: dict[str, tuple[int, ...]], file_size: int, sizes: ModelConfig
) -> GatedExponentialSmoothingLM:
    """A model on the meta device, which takes no memory, after checking that the files have its weights."""
    widest = max(sizes.num_tokens, sizes.dim, sizes.dim_mhesa, sizes.dim_hidden)
    if sizes.depth > len(found) or widest > file_size:
        raise InputError(f"{path} does not fit {CONFIG}: it has fewer weights than these sizes require")
    model = sizes.empty()
    wanted = {saved_name(name): tuple(weight.shape) for name, weight in model.state_dict().items()}
    missing = wanted.keys() - found.keys()
    if sizes.tie_word_embeddings and not missing >= {EMBEDDING, HEAD}:
        # One of these two is enough.
        missing -= {EMBEDDING, HEAD}
    for problem, names in (
        ("missing keys", missing),
        ("unexpected keys", found.keys() - wanted.keys()),
        ("mismatched keys", {name for name in wanted.keys() & found.keys() if wanted[name] != found[name]}),
    ):
        if names:
            first, *others = sorted(names)
            raise InputError(
                f"{path} does not fit {CONFIG}: {problem}: {first}"
                + (f" and {len(others)} more" if others else "")
            )
    return model


def _copy(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight outside the mapped file, which may change."""
    import torch

    if name.endswith(KEPT_IN_FP32) and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    return weight.to(dtype, copy=True)
