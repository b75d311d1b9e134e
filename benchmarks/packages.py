"""Other packages that figures are compared with; each is imported only where it is used."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from mhesa.cli.common import stderr


@cache
def installed(package: str, used_for: str) -> bool:
    """Whether a package is installed; if it is not, one line on standard error says what is left out."""
    found = find_spec(package) is not None
    if not found:
        say(f"{used_for}: not timed, because the package {package} is not installed")
    return found


def say(line: str) -> None:
    """Write a line to standard error, above a progress bar if there is one."""
    stderr.print(line, highlight=False, markup=False, soft_wrap=True)
