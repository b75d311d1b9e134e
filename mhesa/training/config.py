"""Training settings as YAML, by the names of the command line's options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from mhesa.errors import InputError, reason
from mhesa.training.settings import BY_PANEL, TrainingSettings

# Bytes of a file of settings. All of them take a few hundred; PyYAML reads a megabyte in about ten seconds.
LARGEST = 1 << 16


def load_config(path: str | Path) -> dict[str, Any]:
    """The arguments of `TrainingSettings` in a YAML file; `batch-size` and `batch_size` are the same name.

    Raises:
        InputError: the file cannot be read, is not YAML, or names an unknown setting.
    """
    try:
        if os.path.getsize(path) > LARGEST:
            raise InputError(f"{path} is too large for a file of settings")
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except InputError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply to be read") from error
    # The last three: what PyYAML raises for a value that does not fit its tag, as in `!!int ""`.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings; write lines such as: dim: 128")
    types = {setting.name: setting.type for setting in BY_PANEL}
    found = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in types:
            raise InputError(f"{path} names an unknown setting {key}; there are {', '.join(sorted(types))}")
        if isinstance(value, (dict, set)) or (isinstance(value, list) and any(map(_is_nested, value))):
            raise InputError(f"{path}: {key} must be one value or a flat list")
        found[name] = _converted(types[name], value)
    return found


def _is_nested(value: Any) -> bool:
    # A few bytes can name a list of lists that would fill the memory as text.
    return isinstance(value, (dict, list, tuple, set))


def _converted(kind: type, value: Any) -> Any:
    """A YAML value as the setting's type, where YAML has no such type or reads it as text."""
    if kind is tuple and isinstance(value, str):
        return (value,)
    if kind is float and isinstance(value, str):
        # YAML reads 3e-3 as text.
        try:
            return float(value)
        except ValueError:
            return value
    return value


def dump_config(settings: TrainingSettings) -> str:
    """Settings as YAML for `load_config`, by the names of the command line's options."""
    values = {
        setting.name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for setting in BY_PANEL
        if (value := getattr(settings, setting.name)) is not None
    }
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text
