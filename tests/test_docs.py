"""README and the documentation say what is so: their Python runs, and the commands they name exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from serving import running, save_model

from mhesa.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += [ROOT / "benchmarks" / "README.md"]
COMMANDS = typer.main.get_command(app).commands
# Options of other programs that the text names.
FOREIGN = {"--max-restarts", "--multi_gpu", "--cpu"}


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line number and text of the fenced blocks in a language, or in none."""
    text = page.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
    return [(text[: match.start()].count("\n") + 2, match[2]) for match in found if match[1] == language]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `mhesa` command line in the page's blocks and in its running text."""
    lines = "\n".join(text for _, text in blocks(page, "")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    found = [re.search(r"(?:^|\s|/)mhesa ([a-z-].*)", line) for line in lines]
    return [shlex.split(match[1].split(" | ")[0], comments=True) for match in found if match]


def options(command: str) -> set[str]:
    named = {name for option in COMMANDS[command].params for name in (*option.opts, *option.secondary_opts)}
    return named | {"--help"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model where the examples look for it."""
    folder = tmp_path_factory.mktemp("docs")
    save_model(folder / "runs" / "demo")
    (folder / "models").symlink_to(ROOT / "models")
    return folder


@pytest.mark.parametrize(
    ("line", "code"),
    [
        pytest.param(line, code, id=f"{page.name}:{line}")
        for page in PAGES
        for line, code in blocks(page, "python")
    ],
)
def test_python_runs(model, tmp_path, monkeypatch, line, code):
    monkeypatch.chdir(model)
    if "http://127.0.0.1:8000" not in code:
        exec(compile("\n" * (line - 1) + code, "example", "exec"), {})
        return
    with running(model / "runs" / "demo", tmp_path / "log", keys={}) as server:
        code = code.replace("http://127.0.0.1:8000", server.url).replace('"demo"', '"tiny"')
        exec(compile(code, "example", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    for command, *arguments in commands(page):
        if command.startswith("-"):
            assert command in ("--version", "--install-completion")
            continue
        assert command in COMMANDS, f"mhesa {command}"
        named = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
        assert named <= options(command), f"mhesa {command}: {named - options(command)}"


def test_options_exist():
    """An option that the text names alone is one of some command."""
    known = FOREIGN.union(*map(options, COMMANDS))
    for page in PAGES[:1] + [page for page in PAGES if page.parent.name == "docs"]:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        named = set(re.findall(r"`(--[a-z_-]+)", prose))
        assert named <= known, f"{page.name}: {named - known}"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), flags=re.M))
        assert named <= targets, f"{page.name}: {named - targets}"
