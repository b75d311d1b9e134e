"""`mhesa export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mhesa.cli.common import Folder, new_table, resume_garbage_collection, show
from mhesa.errors import InputError


def export(
    folder: Folder,
    *,
    onnx: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Folder for ONNX graphs, in fp32 and int8."),
    ] = None,
    web: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Folder for a page that runs the model in a browser."),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set of the graphs; 20 if omitted.")] = None,
) -> None:
    """Write a model for programs without Python: ONNX graphs, or a page for browsers.

    The page is one file that holds the model and fetches nothing: it works from any static host and from a
    disk. ONNX needs mhesa[onnx]; the graphs are compared with the model before they are kept.

    Examples:

        mhesa export runs/first --web site

        mhesa export runs/first --onnx graphs
    """
    if onnx is None and web is None:
        raise InputError("give --onnx OUT or --web OUT, the folder to write to")
    if opset is not None and onnx is None:
        raise InputError("--opset needs --onnx")
    from mhesa.export.web import PAGE, export_web
    from mhesa.model.loading import load
    from mhesa.web_pages import check_replaceable

    # Before the graphs, which take long to make.
    if web is not None:
        check_replaceable(web / PAGE)
    model, tokenizer = load(folder)
    resume_garbage_collection()
    table = new_table("file", "MB")
    written: list[Path] = []
    if onnx is not None:
        from mhesa.export.onnx import DEFAULT_OPSET, export_onnx

        written += export_onnx(model, onnx, opset=DEFAULT_OPSET if opset is None else opset)
    if web is not None:
        written.append(export_web(model, tokenizer, web, name=folder.resolve().name))
    for path in written:
        table.add_row(str(path), f"{path.stat().st_size / 1e6:.2f}")
    show(table)
