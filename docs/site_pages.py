"""Pages of the site that are made of other files: help, benchmarks, changes, the demo. A hook of mkdocs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mhesa import load
from mhesa.export.web import export_web

ROOT = Path(__file__).parents[1]
# Pages of the site, and the files that they are.
ELSEWHERE = {
    "changes.md": "CHANGELOG.md",
    "speed.md": "benchmarks/README.md",
    "torture.md": "benchmarks/torture.md",
}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages."""
    contents = {
        page: (ROOT / path).read_text().replace("](../docs/", "](") for page, path in ELSEWHERE.items()
    }
    help_pages = [sys.executable, "-m", "typer", "mhesa.cli", "utils", "docs", "--name", "mhesa"]
    contents["command_line.md"] = subprocess.run(
        help_pages, check=True, capture_output=True, text=True
    ).stdout
    for page, content in contents.items():
        files.append(File.generated(config, page, content=content))
    with TemporaryDirectory() as folder:
        demo = export_web(*load(ROOT / "models" / "python"), folder, name="python").read_bytes()
    files.append(File.generated(config, "demo/page.html", content=demo))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files of the repository to the pages that they are here."""
    for target, path in ELSEWHERE.items():
        markdown = markdown.replace(f"](../{path})", f"]({target})")
    return markdown.replace("](../docs/", "](")
