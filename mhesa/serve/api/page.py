"""The pages in a browser; they load nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from starlette.responses import HTMLResponse


def page(name: str) -> HTMLResponse:
    """A page of this package, with a policy that allows only its own script and style."""
    text = resources.files(__package__).joinpath(name).read_text("utf-8")
    policy = (
        f"default-src 'none'; connect-src 'self'; script-src {_hashes('script', text)}; "
        f"style-src {_hashes('style', text)}; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


def _hashes(tag: str, text: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
