"""A model as one web page that needs no server: weights in int8, the model's step in WebAssembly.

`step.wasm` is built from `step.c` by `make wasm`. The page holds everything and is told by its own policy to
fetch nothing, so it works from any static host and from a disk.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mhesa.atomic_io import make_folder, write_file
from mhesa.errors import InputError
from mhesa.export.checks import check_finite
from mhesa.inference.decoder.matmul import check_int8_columns, padded, quantize
from mhesa.inference.session import fingerprint
from mhesa.model.layers import GatedMHESA
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.tokenizers import Bytes, TextTokenizer
from mhesa.web_pages import check_replaceable, policy, read_page

PAGE = "index.html"
# Parts of the file of weights, and rows of matrices, begin at multiples of this many bytes.
ALIGNMENT = 16


def export_web(
    model: GatedExponentialSmoothingLM, tokenizer: Bytes | TextTokenizer, folder: str | Path, *, name: str
) -> Path:
    """Write a folder with one page that runs the model in a browser, from any static host or from a disk.

    The page writes, shows surprisal and keeps sessions. Its arithmetic is that of `Decoder(quantize="int8")`.

    Args:
        model: the language model.
        tokenizer: its tokenizer, of bytes.
        folder: folder to write to; it is made if it is not there.
        name: name of the model on the page.

    Returns:
        The page's path.

    Raises:
        InputError: the tokenizer has a vocabulary, or the model's weights are not finite.
        OSError: the page cannot be written.

    >>> import tempfile
    >>> model = GatedExponentialSmoothingLM(num_tokens=257, dim=16, depth=2, heads=2, dim_mhesa=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_web(model, Bytes(), folder, name="tiny").name
    'index.html'
    """
    if not isinstance(tokenizer, Bytes):
        raise InputError("the page reads bytes, and this model has a vocabulary; use --onnx instead")
    folder = Path(folder)
    check_replaceable(folder / PAGE)
    check_finite(model)
    details = {
        "name": name,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "fingerprint": fingerprint(model),
        "end": tokenizer.eos_token_id,
        "tokens": len(tokenizer),
        "depth": len(model.layers),
        # What tokens beyond the bytes stand for.
        "pieces": {token: tokenizer.decode_bytes([token]).decode() for token in range(256, len(tokenizer))},
    }
    text = read_page(
        "mhesa.export",
        "page.html",
        # Nothing in it may end the script element it stands in.
        details=json.dumps(details).replace("<", "\\u003c"),
        step=_base64(resources.files(__package__).joinpath("step.wasm").read_bytes()),
        weights=_base64(weights(model)),
    )
    make_folder(folder)
    with write_file(folder / PAGE) as file:
        file.write(text.replace("{{ policy }}", policy(text, scripts="'wasm-unsafe-eval'")).encode())
    return folder / PAGE


@torch.no_grad()
def weights(model: GatedExponentialSmoothingLM) -> bytes:
    """The model's sizes and weights in the order `step.c` reads them: int8 matrices, the rest fp32."""
    return b"".join(part + bytes(-len(part) % ALIGNMENT) for part in _parts(model))


def _parts(model: GatedExponentialSmoothingLM) -> Iterator[bytes]:
    blocks = [cast(GatedMHESA, block) for block in model.layers]
    first = blocks[0]
    adaptive, taps = first.to_alpha is not None, 0 if first.conv is None else len(first.conv.weight)
    inner, hidden = first.to_gate.in_features, first.to_out.in_features
    sizes = [*model.token_emb.weight.shape, len(blocks), first.mhesa.heads, inner, hidden, taps, adaptive]
    yield torch.tensor(sizes, dtype=torch.int32).numpy().tobytes()
    yield _floats(model.token_emb.weight)
    for block in blocks:
        mhesa = block.mhesa
        yield from map(_floats, (block.norm.weight, block.norm.bias))
        if block.conv is not None:
            yield _floats(block.conv.weight)
        matrices = [cast(torch.nn.Linear, part[0]).weight for part in (block.to_u, block.to_v)]
        yield from _matrices(matrices if block.to_alpha is None else [*matrices, block.to_alpha.weight])
        rates = mhesa.rates() if block.to_alpha is None else (mhesa.alphas, mhesa.dampen_factors.sigmoid())
        yield from map(_floats, (mhesa.norm.weight, mhesa.norm.bias, *rates, mhesa.param_D))
        yield from _matrices([block.to_gate.weight, block.to_out.weight])
        yield _floats(block.to_out.bias)
    yield from _matrices([model.to_logits.weight])


def _matrices(matrices: Iterable[Tensor]) -> Iterator[bytes]:
    for weight in matrices:
        check_int8_columns(weight.shape[1])
        matrix, scales = quantize(weight)
        yield _floats(scales)
        columns = padded(matrix.shape[1], ALIGNMENT)
        yield torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1])).cpu().numpy().tobytes()


def _floats(values: Tensor) -> bytes:
    return values.float().cpu().contiguous().numpy().astype("<f4").tobytes()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
