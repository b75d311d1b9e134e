"""Web pages of one file, whose policy lets a browser run their own script and style, and no others."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from pathlib import Path

from mhesa.errors import InputError

# What the pages that are written for users say of themselves, within their first bytes.
GENERATOR, BEGINNING = b'<meta name="generator" content="mhesa">', 1024


def read_page(package: str, name: str, **values: str) -> str:
    """The text of a page that is a file of a package, with the style and script that pages share.

    `values` are put in the places of their names, as in `{{ name }}`.
    """
    shared = {part: _read("mhesa", f"web_pages.{end}") for part, end in (("style", "css"), ("script", "js"))}
    text = _read(package, name)
    for place, value in (shared | values).items():
        text = text.replace(f"{{{{ {place} }}}}", value)
    return text


def _read(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text("utf-8")


def check_replaceable(path: Path) -> None:
    """Raise `InputError` if `path` holds anything else than a page of ours, which has `GENERATOR`."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(BEGINNING)
    if start and GENERATOR not in start:
        raise InputError(
            f"{path} is there, and is not marked as a page of mhesa (an old one is not); move it, "
            "or give another place"
        )


def policy(text: str, *, connect: str = "'none'", scripts: str = "") -> str:
    """The content security policy of a page whose scripts and styles stand in it, without attributes.

    Args:
        text: the page.
        connect: where its scripts may send requests.
        scripts: what else they may do, such as `'wasm-unsafe-eval'`, to compile WebAssembly.
    """
    return (
        f"default-src 'none'; connect-src {connect}; script-src {_hashes('script', text)} {scripts}; "
        f"style-src {_hashes('style', text)}; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hashes(tag: str, text: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
