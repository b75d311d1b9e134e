"""The pages in a browser; they load nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from starlette.responses import HTMLResponse

from mhesa.web_pages import policy


def page(name: str) -> HTMLResponse:
    """A page of this package, with a policy that allows only its own script and style."""
    text = resources.files(__package__).joinpath(name).read_text("utf-8")
    allowed = policy(text, connect="'self'") + "; frame-ancestors 'none'"
    return HTMLResponse(text, headers={"Content-Security-Policy": allowed})
