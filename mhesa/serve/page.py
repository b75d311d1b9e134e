"""The playground: one static page, nothing fetched from outside."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

PAGE = resources.files("mhesa.serve").joinpath("playground.html").read_text("utf-8")


def _hashes(tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


# Only what the page itself holds may run or style it, and it may talk to this server alone.
CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; connect-src 'self'; script-src {_hashes('script')}; style-src {_hashes('style')}; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
