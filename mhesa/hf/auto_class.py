"""Keeps transformers from copying this package's source into the folders that it saves."""

from __future__ import annotations

from typing import Any


class NoSourceCopies:
    """Mix-in of the classes that a folder's `auto_map` names.

    Transformers registers a class that it loaded with `trust_remote_code=True`, and copies the source of a
    registered class beside what it saves. Folders name the installed package instead: `mhesa.remote_code`.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: what is saved names this class anyway."""
