"""What makes transformers find this package from a saved folder, without `import mhesa.hf`.

Transformers imports a folder's Python file if the user says `trust_remote_code=True`. Ours holds no code: it
names classes of the installed package. `mhesa` itself never reads it.
"""

from __future__ import annotations

from pathlib import Path

from mhesa.atomic_io import write_file

MODULE = "modeling_mhesa"
FILE = f"{MODULE}.py"
SOURCE = '''"""For transformers' trust_remote_code=True: the classes of the installed package mhesa."""

from mhesa.hf import ByteTokenizer, MhesaConfig, MhesaForCausalLM, MhesaModel  # noqa: F401
'''
# The values of `auto_map` in `config.json`, and in `tokenizer_config.json`: a slow tokenizer and no fast one.
MODELS = {
    "AutoConfig": f"{MODULE}.MhesaConfig",
    "AutoModel": f"{MODULE}.MhesaModel",
    "AutoModelForCausalLM": f"{MODULE}.MhesaForCausalLM",
}
BYTES = {"AutoTokenizer": (f"{MODULE}.ByteTokenizer", None)}


def write_module(folder: Path) -> Path:
    """Write the file that the values of `auto_map` name into a folder that exists; returns its path."""
    with write_file(folder / FILE) as file:
        file.write(SOURCE.encode())
    return folder / FILE
