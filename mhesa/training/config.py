"""Settings as YAML, under the names that the command line's options have."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from mhesa.errors import InputError
from mhesa.training.settings import TrainingSettings

NUMBERS = {"float", "float | None"}


def load_config(path: str | Path) -> dict[str, Any]:
    """Settings out of a YAML file, by the names that `TrainingSettings` has; `batch-size` is `batch_size`.

    Raises:
        InputError: the file cannot be read, is not YAML, or names a setting that there is not.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings; write lines such as: dim: 128")
    types = {field.name: field.type for field in fields(TrainingSettings)}
    found = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in types:
            raise InputError(f"{path} names an unknown setting {key}; there are {', '.join(sorted(types))}")
        found[name] = _as(str(types[name]), value)
    return found


def _as(kind: str, value: Any) -> Any:
    """Take a string for the number, and a list for the tuple, that YAML made it of."""
    if isinstance(value, list):
        return tuple(map(str, value))
    if kind.startswith("tuple") and isinstance(value, str):
        return (value,)
    if isinstance(value, str) and kind in NUMBERS:
        # YAML takes 3e-3 for text.
        try:
            return float(value)
        except ValueError:
            return value
    return value


def dump_config(settings: TrainingSettings) -> str:
    """Settings as YAML that `load_config` reads, under the names of the command line."""
    values = {
        name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for name, value in asdict(settings).items()
        if value is not None
    }
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text
