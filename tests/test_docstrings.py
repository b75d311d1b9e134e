"""Public names have docstrings, with shapes where tensors go in or out."""

import importlib
import inspect
import pkgutil
import re

import pytest

import mhesa

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(mhesa.__path__, "mhesa.")
    if not module.name.rpartition(".")[2].startswith("_")
)
# `(batch, length)`, `(heads,)`, `(2 * depth, ..., dim)`; words where no shape is fixed; or what else says it.
SHAPE = re.compile(r"\(\s*[\w*.][^()]*,[^()]*\)|\bscalars?\b|\bany shapes?\b|\b(See|as) `mhesa\.")


def public(owner):
    """Functions and classes that a module or a class defines, by qualified name."""
    module = owner.__name__ if inspect.ismodule(owner) else owner.__module__
    for name, value in vars(owner).items():
        value = (
            value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
        )
        if (
            name.startswith("_")
            or getattr(value, "__module__", None) != module
            or "<locals>" in getattr(value, "__qualname__", "<locals>")
        ):
            continue
        if inspect.isfunction(value):
            yield value
        elif inspect.isclass(value) and inspect.ismodule(owner):
            yield value
            yield from public(value)


def takes_tensors(function):
    annotations = getattr(function, "__annotations__", {}).items()
    return any(re.search(r"\bTensor\b", str(kind)) for name, kind in annotations if not name.startswith("_"))


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_described(name):
    module = importlib.import_module(name)
    assert module.__doc__
    missing = []
    for value in public(module):
        doc = value.__doc__ or ""
        # A class's docstring describes the arguments of its methods.
        owner = module
        for part in value.__qualname__.split(".")[:-1]:
            owner = getattr(owner, part, None)
        whole = doc + ((owner.__doc__ or "") if inspect.isclass(owner) else "")
        if not doc:
            missing.append(f"{value.__qualname__}: a docstring")
        elif takes_tensors(value) and not SHAPE.search(whole):
            missing.append(f"{value.__qualname__}: the shapes of its tensors")
    assert not missing, "\n".join(missing)
