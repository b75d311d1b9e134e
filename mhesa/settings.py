"""Settings declared once: dataclass fields with their documentation and range beside them.

    lr: Annotated[float, Doc("Peak learning rate.", POSITIVE, panel="Training")] = 3e-3

Such a field gives the class its documentation and checks, the command line an option, YAML a key, and
`docs/settings.md` a row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from numbers import Integral
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mhesa.errors import InputError

T = TypeVar("T")
# Whole numbers have 64 bits everywhere; Python's may have any number of digits, and then cannot be printed.
LARGEST_INTEGER = (1 << 64) - 1
SMALLEST_INTEGER = -(1 << 63)

# The types that are checked: the Python types that a value may have, and their name in an error.
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "text"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    tuple: ((tuple,), "a list of texts"),
}


@dataclass(frozen=True)
class Range:
    """The values that a setting may have.

    Args:
        words: description of the values in an error and in the documentation.
        contains: whether a value is one of them.
        choices: all of them, where they are a few words.
    """

    words: str
    contains: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


AT_LEAST_1 = Range("at least 1", lambda value: value >= 1)
AT_LEAST_0 = Range("0 or more", lambda value: 0 <= value < math.inf)
# Far from the largest and the smallest numbers of fp32, so that arithmetic with them does not overflow.
POSITIVE = Range("a number from 1e-30 to 1e30", lambda value: 1e-30 <= value <= 1e30)
FRACTION = Range("at least 0 and below 1", lambda value: 0 <= value < 1)
FINITE = Range("a number from -1e30 to 1e30", lambda value: -1e30 <= value <= 1e30)


def one_of(*choices: str) -> Range:
    """The range of a setting that is one of a few words."""
    return Range(f"one of {', '.join(choices)}", choices.__contains__, choices)


@dataclass(frozen=True)
class Doc:
    """The documentation and range of a field, as part of its annotation.

    Args:
        text: what the setting does, in a sentence or two.
        range: the values that it may have.
        panel: the group of settings that it belongs to.
        metavar: the form of its value, such as `bytes|bpe:N|PATH`.
    """

    text: str
    range: Range | None = None
    panel: str = ""
    metavar: str | None = None


@dataclass(frozen=True)
class Setting:
    """One field of a settings class.

    Args:
        name: the field's name.
        type: its type without `None`; `tuple` for a tuple of any items.
        optional: whether it may be `None`.
        default: its default; `dataclasses.MISSING` if it has to be given.
        doc: its documentation.
    """

    name: str
    type: Any
    optional: bool
    default: Any
    doc: Doc

    @property
    def required(self) -> bool:
        """Whether the setting has to be given."""
        return self.default is MISSING

    @property
    def hint(self) -> Any:
        """The annotation of a parameter for it: its type, or `None` where it may be left out."""
        return self.type | None if self.optional or self.required else self.type


@lru_cache
def settings_of(cls: type) -> tuple[Setting, ...]:
    """The fields of a dataclass that have a `Doc`, in their order.

    >>> from mhesa.inference.sampling_settings import Sampling
    >>> [setting.name for setting in settings_of(Sampling)][:2]
    ['temperature', 'top_k']
    """
    hints = get_type_hints(cls, include_extras=True)
    found = []
    for field in fields(cls):
        hint, *extras = get_args(hints[field.name]) or (hints[field.name],)
        docs = [extra for extra in extras if isinstance(extra, Doc)]
        if docs:
            kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            types = [kind for kind in kinds if kind is not NoneType]
            kind = (get_origin(types[0]) or types[0]) if len(types) == 1 else hint
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            found.append(Setting(field.name, kind, NoneType in kinds, default, docs[0]))
    return tuple(found)


def setting_of(cls: type, name: str) -> Setting:
    """The field of that name."""
    return next(setting for setting in settings_of(cls) if setting.name == name)


def check_types(settings: Any) -> None:
    """Raise `InputError` naming the first setting of a wrong type."""
    for setting in settings_of(type(settings)):  # type: ignore[arg-type]
        value = getattr(settings, setting.name)
        if value is None and setting.optional:
            continue
        accepted, words = KINDS.get(setting.type, ((object,), ""))
        if not isinstance(value, accepted) or (isinstance(value, bool) and setting.type in (int, float)):
            raise InputError(f"{setting.name} must be {words}, not {value!r}")
        if isinstance(value, int) and not SMALLEST_INTEGER <= value <= LARGEST_INTEGER:
            raise InputError(f"{setting.name} must fit in 64 bits")


def check_ranges(settings: Any) -> None:
    """Raise `InputError` naming the first setting out of range."""
    for setting in settings_of(type(settings)):  # type: ignore[arg-type]
        value, allowed = getattr(settings, setting.name), setting.doc.range
        if value is not None and allowed is not None and not allowed.contains(value):
            raise InputError(f"{setting.name} must be {allowed.words}, not {value}")


def documented(cls: type[T]) -> type[T]:
    """Add the fields' documentation to the docstring of a dataclass, under `Args:`."""
    found = settings_of(cls)  # type: ignore[arg-type]  # to mypy, a class of any kind is not hashable
    lines = "".join(f"\n    {setting.name}: {setting.doc.text}" for setting in found)
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nArgs:{lines}"
    return cls


def check_sizes(allowed: Range = AT_LEAST_1, **sizes: Any) -> None:
    """Raise `InputError` naming the first size that is out of range or no whole number."""
    for name, size in sizes.items():
        if not isinstance(size, Integral):
            raise InputError(f"{name} must be a whole number, not {size!r}")
        if not allowed.contains(size):
            raise InputError(f"{name} must be {allowed.words}, not {size}")


def expanded_size(dim: int, dim_expansion_factor: float) -> int:
    """The width of a gate, `int(dim_expansion_factor * dim)`.

    Raises:
        InputError: it is below 1 or no whole number of 64 bits.
    """
    size = dim_expansion_factor * dim
    if not 1 <= size < LARGEST_INTEGER:
        raise InputError(f"dim_expansion_factor * dim must be at least 1 and fit in 64 bits, not {size:g}")
    return int(size)


def check_divisible(name: str, size: int, heads: int) -> None:
    """Raise `InputError` unless `heads` divides `size`."""
    if size % heads:
        raise InputError(f"{name} must be divisible by heads, but {size} is not by {heads}")
