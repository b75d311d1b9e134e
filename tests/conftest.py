"""What every test runs under."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator

import pytest

# One thread a process: on a machine kept busy by several workers, threads that wait for each other are slow.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell starts programs in the background with Ctrl-C ignored, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prepare a process that runs tests; one that only hands them out imports nothing."""
    if session.config.pluginmanager.hasplugin("dsession"):
        return
    # What is imported stays. Searching it for garbage would take a tenth of the tests' time.
    gc.disable()
    import torch

    torch.set_num_threads(1)
    # Read when triton is first imported: without a GPU its interpreter runs the kernels.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Start garbage collection, without what was imported."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(autouse=True)
def _kept_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no command change that: one that ends in this process would unfreeze what was imported."""
    for name in ("freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, lambda: None)


# Where CI is set, a test may be skipped for these reasons alone.
REASONS_TO_SKIP = ("no CUDA device",)


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith(REASONS_TO_SKIP):
            report.outcome, report.longrepr = "failed", f"CI may not skip this: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that is skipped where none may be."""
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail a file that is skipped where none may be."""
    report = yield
    _refuse_skip(report)
    return report


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
    import torch

    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def standard_input(monkeypatch, tmp_path):
    """Put text where this process reads its standard input."""

    def put(text):
        path = tmp_path / "standard input"
        path.write_bytes(text)
        monkeypatch.setattr(sys, "stdin", path.open())

    return put


@pytest.fixture
def run(monkeypatch, capsysbinary, standard_input):
    """Run the command in this process: its exit code, standard output and standard error."""

    def run(*arguments, data=b""):
        from mhesa import cli

        capsysbinary.readouterr()
        monkeypatch.setattr(sys, "argv", ["mhesa", *map(str, arguments)])
        standard_input(data)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capsysbinary.readouterr()

    return run


# Triton's kernels


@pytest.fixture
def triton_device(monkeypatch):
    """A GPU or Triton's interpreter; memory that a kernel should fill is poisoned there, too."""
    import torch
    from triton_scans import use_device

    use_device(monkeypatch)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(params=["whole", "tiles"])
def regime(request, monkeypatch):
    """A program a sequence, or a program a few tiles."""
    from triton_scans import set_regime

    set_regime(monkeypatch, request.param)
    return request.param


# A small model, and a server of it for all tests that ask for one


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small model's folder."""
    from serving import save_model

    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def server(folder, tmp_path_factory):
    """A running server; nothing may have gone wrong inside by its end."""
    from serving import ENDLESS, running

    log = tmp_path_factory.mktemp("log") / "log"
    limits = {"max_tokens": ENDLESS, "receive_seconds": 1.0, "send_seconds": 1.0}
    settings = {"limits": limits, "slots": 32, "queue": 32, "allow_origins": ["http://localhost:8123"]}
    with running(folder, log, **settings) as server:
        yield server
        assert {event["event"] for event in server.events()} <= {"listening", "request", "refused", "cut"}


@pytest.fixture(scope="session")
def client(server):
    """OpenAI's own client."""
    import httpx
    from serving import KEYS

    openai = pytest.importorskip("openai")
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key=KEYS["alice"],
        max_retries=0,
        http_client=httpx.Client(trust_env=False),
    ) as client:
        yield client


@pytest.fixture
def http(server):
    """A client that sends what it is told."""
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def browser():
    """Chromium, whose event loop ends with the module: other tests run their own."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium here: apt install chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session", params=["bytes", "bpe"])
def served(request, folder, tmp_path_factory):
    """A server in this process of a model with bytes or a vocabulary, and the model itself."""
    from serving import WORDS, in_process, save_model

    from mhesa import Reader, load
    from mhesa.tokenizers import train_bpe

    if request.param == "bpe":
        folder = save_model(tmp_path_factory.mktemp("bpe") / "tiny", train_bpe([WORDS.encode()] * 9, 300))
    with in_process(folder, slots=64) as http:
        yield http, Reader(*load(folder))


@pytest.fixture(scope="session")
def greedy(folder):
    """What transformers writes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))

    def write(prompt, tokens):
        ids = torch.tensor([[256, *prompt.encode()]])
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode_bytes(out).decode("utf-8", "replace")

    return write
