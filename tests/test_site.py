"""The documentation's site: no warning, no broken link, and nothing that is fetched from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a browser loads by itself: scripts, pictures, styles and fonts.
LOADED = r"""<(script|img|iframe)[^>]*\ssrc="https?:|<link[^>]*rel="stylesheet"[^>]*href="https?:"""


def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    assert tmp_path / "demo" / "page.html" in pages
    for page in pages:
        text = page.read_text("utf-8")
        assert not re.search(LOADED, text), page
        # Examples and markup that were not understood.
        assert "<p>&gt;&gt;&gt;" not in text, page
        assert ".. code-block" not in text, page
