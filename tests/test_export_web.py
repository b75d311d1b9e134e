"""The page that holds a model, in a real browser, from a disk, with every request refused."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from browsing import CONTRAST
from serving import WORDS, save_model

import mhesa.export
from mhesa import Reader, Session, load
from mhesa.model.config import ModelConfig
from mhesa.model.loading import save
from mhesa.tokenizers import Bytes, train_bpe

TEXT = "né 日本 🙂\nline"
HERE = Path(mhesa.export.__file__).parent


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models with every kind of block: fixed rates; adaptive ones and a convolution, odd sizes."""
    root, folders = tmp_path_factory.mktemp("models"), {}
    odd = {"adaptive": True, "conv_size": 4, "dim": 24, "dim_mhesa": 20, "heads": 4}
    for name, sizes in {"fixed": {"dim": 32, "dim_mhesa": 16}, "adaptive": odd}.items():
        torch.manual_seed(0)
        model = ModelConfig(depth=2, **sizes).build()
        with torch.no_grad():
            # Large enough for predictions to be clear; greedy texts are ASCII, and never end by themselves.
            model.to_logits.weight.normal_(std=2)
            model.to_logits.weight[torch.tensor([*range(32), *range(127, 257)])] = 0
        save(model, Bytes(), root / name)
        folders[name] = root / name
    return folders


@pytest.fixture
def exported(run, models, tmp_path):
    """Export a model and give the page's path."""

    def export(name):
        code, _, err = run("export", models[name], "--web", tmp_path / "site")
        assert (code, err) == (0, b""), err
        assert [path.name for path in (tmp_path / "site").iterdir()] == ["index.html"]
        return tmp_path / "site" / "index.html"

    return export


@pytest.fixture
def page(browser):
    context = browser.new_context()
    page = context.new_page()
    page.faults, page.asked = [], []
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.route(re.compile("^(?!file:)"), lambda route: (page.asked.append(route.request.url), route.abort()))
    yield page
    context.close()


def visit(page, path):
    page.goto(path.as_uri())
    page.wait_for_selector("#text:enabled")
    assert page.text_content("#failure") == ""


def read(page, text):
    page.fill("#text", text)
    size = f"{len(text.encode()):,}"
    page.wait_for_function("size => document.getElementById('bytes').textContent === size", arg=size)


def shown(page):
    return [float(mark.get_attribute("data-bits")) for mark in page.locator("#heat span").all()]


def assert_greedy(decoder, text, written):
    """500 bytes, each the likeliest or, as the page sums in another order, as good as that."""
    assert len(written.encode()) == 500
    ids = torch.tensor([256, *(text + written).encode()])
    logits = decoder.predict(ids[:-1], decoder.initial_state(1))
    short = logits.amax(1) - logits.gather(1, ids[1:, None])[:, 0]
    assert short[len(text.encode()) :].max() < 0.05


@pytest.mark.parametrize("name", ["fixed", "adaptive"])
def test_it_writes_and_measures_as_mhesa_does(page, exported, models, name):
    visit(page, exported(name))
    session = Session(Reader(*load(models[name]), quantize="int8"))
    read(page, TEXT[:5])
    read(page, TEXT)
    assert page.locator("#heat span").all_text_contents() == list(TEXT)
    bits = iter(session.score(TEXT).tolist())
    expected = [sum(next(bits) for _ in char.encode()) for char in TEXT]
    assert shown(page) == pytest.approx(expected, abs=0.02)
    page.fill("#temperature", "0")
    page.fill("#length", "500")
    page.click("#go")
    page.wait_for_selector("#go:enabled")
    greedy = page.input_value("#text").removeprefix(TEXT)
    assert_greedy(session.reader.decoder, TEXT, greedy)
    assert page.text_content("#count") == "500"
    assert int(page.text_content("#speed").replace(",", "")) > 0
    # A byte order mark is a character as others are.
    read(page, "\ufeffhello")
    assert page.locator("#heat span").all_text_contents() == list("\ufeffhello")
    # An edit far back: what is read again is as if read the first time.
    read(page, TEXT + greedy[:100] + "!" + greedy[100:])
    again = Session(Reader(*load(models[name]), quantize="int8"))
    total = again.score(TEXT + greedy[:100] + "!" + greedy[100:]).mean().item()
    assert float(page.text_content("#bits")) == pytest.approx(total, abs=0.01)
    assert page.faults == []
    assert page.asked == []


def test_sessions_outlive_the_page_and_go_their_own_ways(page, exported):
    path = exported("fixed")
    visit(page, path)
    read(page, "one\n" * 100)
    page.fill("#temperature", "0")
    page.fill("#length", "20")
    page.fill("#name", "first")
    page.press("#name", "Enter")
    page.wait_for_selector("li:has-text('first')")
    page.click("#go")
    page.wait_for_selector("#go:enabled")
    written = page.input_value("#text")
    page.reload()
    page.wait_for_selector("#text:enabled")
    page.click("[aria-label='Fork first']")
    page.wait_for_selector("li:has-text('first (2)')")
    assert (page.input_value("#text"), page.input_value("#name")) == ("one\n" * 100, "first (2)")
    page.fill("#temperature", "0")
    page.fill("#length", "20")
    page.click("#go")
    page.wait_for_selector("#go:enabled")
    assert page.input_value("#text") == written
    read(page, "two")
    page.click("#save button")
    page.click("[aria-label='Open first']")
    page.wait_for_function("document.getElementById('text').value.startsWith('one')")
    page.click("[aria-label='Open first (2)']")
    page.wait_for_function("document.getElementById('text').value === 'two'")
    page.click("[aria-label='Delete first']")
    page.wait_for_selector("[aria-label='Delete first']", state="detached")
    assert page.locator("li").count() == 1
    assert page.faults == []


def test_refused_storage_is_shown(page, exported, tmp_path):
    """A frame without an origin of its own has no storage."""
    path = exported("fixed")
    (path.parent / "frame.html").write_text(
        '<iframe sandbox="allow-scripts allow-forms" src="index.html"></iframe>'
    )
    page.goto((path.parent / "frame.html").as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("#storage:not(:empty)").wait_for()
    assert "sessions last until it is closed" in frame.locator("#storage").text_content()
    frame.locator("#text:enabled").fill("kept for now")
    frame.locator("#name").fill("first")
    frame.locator("#save button").click()
    frame.locator("[aria-label='Fork first']").click()
    frame.locator("[aria-label='Open first (2)']").wait_for()


def test_a_browser_without_simd_is_told(page, exported):
    """Validation stands for the browser's own: it is what such a browser says of the module."""
    page.add_init_script("WebAssembly.validate = () => false")
    page.goto(exported("fixed").as_uri())
    page.wait_for_selector("#failure:not(:empty)")
    assert "lacks WebAssembly with SIMD" in page.text_content("#failure")
    assert page.is_disabled("#go")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_it_fits_the_screen_and_works_by_keyboard(page, exported, tmp_path, scheme, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    visit(page, exported("fixed"))
    page.focus("#text")
    page.keyboard.type("<img src=x onerror=alert(1)>")
    page.fill("#name", "a name of many letters and no end " * 2)
    page.press("#name", "Enter")
    page.wait_for_selector("li")
    page.focus("#heat")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#picked").startswith('"<": ')
    read(page, "")
    assert page.text_content("#picked").startswith("Point at a character")
    read(page, "<img src=x onerror=alert(1)>")
    assert page.locator("#heat img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("body", ".figures", "label", "#go", "li button"):
        assert page.evaluate(CONTRAST, name) >= 4.5, name
    unnamed = "[...document.querySelectorAll('input, textarea')].filter(x => !x.labels.length).length"
    assert page.evaluate(unnamed) == 0
    page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)


def test_the_module_is_made_of_its_source():
    """The linker's build id is the digest of the source: see `make wasm`."""
    digest = hashlib.sha256((HERE / "step.c").read_bytes()).digest()
    assert digest in (HERE / "step.wasm").read_bytes()


def test_a_refused_export_is_one_line(run, models, tmp_path):
    bpe = save_model(tmp_path / "bpe", train_bpe([WORDS.encode()] * 9, 300))
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([bpe, "--web", tmp_path / "out"], "the page reads bytes, and this model has a vocabulary"),
        ([tmp_path, "--web", tmp_path / "out"], "is not a model's folder"),
        ([models["fixed"]], "give --onnx OUT or --web OUT"),
        ([models["fixed"], "--web", tmp_path / "file"], "is a file; give a folder"),
    ):
        code, out, err = run("export", *arguments)
        assert (code, out) == (2, b"")
        assert message in err.decode().replace("\n", " ")
        assert err.count(b"\n") == 1
    assert not (tmp_path / "out").exists()
