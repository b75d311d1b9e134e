"""What every test runs under."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what tests make of corpora out of the user's cache, in this process and in those it starts."""
    os.environ["MHESA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def torture_report() -> Callable[[str], None]:
    """Add a line to the report that `make torture` writes, if it does."""

    def record(line: str) -> None:
        if report := os.environ.get("TORTURE_REPORT"):
            with open(report, "a") as file:
                file.write(f"| {line} |\n")

    return record


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that an element nobody wrote cannot pass for a result."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run(monkeypatch, capsysbinary):
    """Run the command in this process: its exit code, standard output and standard error."""

    def run(*arguments, data=b""):
        from mhesa import cli

        capsysbinary.readouterr()
        monkeypatch.setattr(sys, "argv", ["mhesa", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capsysbinary.readouterr()

    return run
