"""The playground in a real browser."""

import pytest
from browsing import CONTRAST
from serving import KEYS

TEXT = "né 日本 🙂\nline"


@pytest.fixture
def page(browser, server):
    """A page of somebody who gave the API key for a password; what goes wrong in it, and where it goes."""
    context = browser.new_context(
        base_url=server.url, http_credentials={"username": "alice", "password": KEYS["alice"]}
    )
    page = context.new_page()
    page.faults, page.asked = [], []
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto("/")
    page.wait_for_selector("h1:has-text('tiny')")
    yield page
    context.close()


def written(page):
    page.wait_for_selector("#go:enabled")
    return page.text_content("#out")


def test_text_is_written_as_the_api_writes_it(page, server):
    page.fill("#prompt", TEXT)
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "64")
    page.click("#go")
    with server.client() as http:
        body = {"prompt": TEXT, "temperature": 0, "max_tokens": 64, "echo": True}
        expected = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert written(page) == expected
    assert page.text_content("#count") == "64"
    assert int(page.text_content("#speed").replace(",", "")) > 0
    assert page.text_content("#memory") == "128 bytes"
    assert page.faults == []
    assert all(url.startswith((server.url, "data:")) for url in page.asked)


def test_a_session_is_continued(page, server):
    page.fill("#session", "page")
    for _ in range(2):
        page.click("#go")
        written(page)
    with server.client() as http:
        assert http.get("/v1/sessions/page").json()["position"] == 2 * (4 + 400)


def test_writing_can_be_stopped(page, server):
    page.fill("#max_tokens", "4096")
    for _ in range(5):
        page.click("#go")
        page.click("#stop", force=True)
        written(page)
    server.wait_for("mhesa_texts_active", 0)
    assert page.text_content("#write-error") == ""


@pytest.mark.parametrize("unit", ["word", "character"])
def test_the_heat_map_is_the_apis_surprisal(page, server, unit):
    page.fill("#sample", TEXT)
    page.select_option("#unit", unit)
    page.click("#measure")
    page.wait_for_selector("#heat span")
    assert page.text_content("#heat") == TEXT
    marks = page.locator("#heat span")
    assert marks.all_text_contents() == (TEXT.split() if unit == "word" else list(TEXT))
    with server.client() as http:
        items = http.post("/v1/score", json={"input": TEXT, "by": unit}).json()["data"][0]["items"]
    expected = [
        f"{item['bits']:.2f} bits, rank {item['rank']}, entropy {item['entropy']:.2f} bits" for item in items
    ]
    assert [mark.get_attribute("title") for mark in marks.all()] == expected
    page.focus("#heat")
    page.keyboard.press("ArrowRight")
    assert expected[0] in page.text_content("#picked")
    assert page.faults == []


def test_markup_in_text_stays_text(page):
    page.fill("#sample", "<img src=x onerror=alert(1)>")
    page.click("#measure")
    page.wait_for_selector("#heat span")
    page.fill("#prompt", "<script>alert(1)</script>")
    page.click("#go")
    assert written(page).startswith("<script>alert(1)</script>")
    assert page.locator("#heat img, #out script").count() == 0


def test_errors_are_shown(page):
    page.fill("#prompt", "x" * 1_100_000)
    page.click("#go")
    page.wait_for_selector("#write-error:not(:empty)")
    assert "the body may have at most" in page.text_content("#write-error")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_it_fits_the_screen_and_can_be_read(page, tmp_path, scheme, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.click("#go")
    page.click("#measure")
    page.wait_for_selector("#heat span")
    written(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("body", ".figures", "label", "button"):
        assert page.evaluate(CONTRAST, name) >= 4.5, name
    unnamed = "[...document.querySelectorAll('input, textarea')].filter(x => !x.labels.length).length"
    assert page.evaluate(unnamed) == 0
    page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_the_api_is_described_for_a_person(page, server, tmp_path, scheme, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.goto("/docs")
    page.wait_for_selector("h2:has-text('Errors')")
    with server.client() as http:
        api = http.get("/openapi.json").json()
    routes = [(method, path) for path, methods in api["paths"].items() for method in methods]
    assert [title.lower() for title in page.locator("#all h2").all_text_contents()] == [
        *(f"{method}{path}".lower() for method, path in routes),
        "errors",
    ]
    written = page.locator("section:has(h2:has-text('/v1/completions'))").first
    for name, field in api["components"]["schemas"]["CompletionRequest"]["properties"].items():
        assert written.locator(f"dt:has(code:text-is('{name}'))").count() >= 1, name
        assert field.get("description", "") in written.text_content()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("body", ".soft", "a", "dt"):
        assert page.evaluate(CONTRAST, name) >= 4.5, name
    assert page.faults == []
    assert all(url.startswith((server.url, "data:")) for url in page.asked)
    page.screenshot(path=tmp_path / f"docs-{scheme}-{width}.png", full_page=True)


FETCH = """async ([url, key]) => {
  const headers = { "Authorization": `Bearer ${key}`, "Content-Type": "application/json" };
  const body = JSON.stringify({ prompt: "7 bottles", max_tokens: 5, temperature: 0 });
  try {
    const answer = await fetch(url + "/v1/completions", { method: "POST", headers, body });
    return (await answer.json()).choices[0].text;
  } catch (error) { return String(error); }
}"""


@pytest.mark.parametrize("origin", ["http://localhost:8123", "http://localhost:8124"])
def test_a_page_of_another_origin_needs_to_be_allowed(browser, server, origin):
    # Chromium asks its user before a page may reach this machine.
    context = browser.new_context(permissions=["local-network-access"])
    page = context.new_page()
    page.route(f"{origin}/", lambda route: route.fulfill(body="<p>here", content_type="text/html"))
    page.goto(f"{origin}/")
    found = page.evaluate(FETCH, [server.url, KEYS["alice"]])
    with server.client() as http:
        body = {"prompt": "7 bottles", "max_tokens": 5, "temperature": 0}
        expected = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert found == (expected if origin == "http://localhost:8123" else "TypeError: Failed to fetch")
    context.close()
