"""The pages in a browser; they load nothing from elsewhere."""

from __future__ import annotations

from starlette.responses import HTMLResponse

from mhesa.web_pages import policy, read_page


def page(name: str) -> HTMLResponse:
    """A page of this package, with a policy that allows only its own script and style."""
    text = read_page("mhesa.serve.api", name)
    allowed = policy(text, connect="'self'") + "; frame-ancestors 'none'"
    return HTMLResponse(text, headers={"Content-Security-Policy": allowed})
