"""`mhesa serve`."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated, Any

import typer

from mhesa.atomic_io import check_outputs
from mhesa.cli.common import Backend, Device, Folder, Quantize
from mhesa.cli.options import option, with_options
from mhesa.errors import InputError
from mhesa.serve.settings import Limits, Settings, read_keys


@with_options(
    *(option(Settings, name) for name in ("host", "port", "sessions", "slots", "queue")),
    option(Settings, "name", default=None),
    option(Limits, "max_tokens"),
    option(Limits, "request_seconds", name="timeout"),
)
def serve(
    folder: Folder,
    *,
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="API keys of clients, one 'name: key' a line.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="Let web pages of this origin use the server; * is any origin. Repeatable."
        ),
    ] = None,
    quantize: Quantize = None,
    device: Device = "cpu",
    backend: Backend = None,
    **given: Any,
) -> None:
    """Serve a model through OpenAI's API, and a page to try it in a browser.

    Examples:

        mhesa serve runs/first

        mhesa serve runs/first --host 0.0.0.0 --keys keys.txt --sessions sessions.sqlite
    """
    try:
        from mhesa.serve.api.service import Service
        from mhesa.serve.http.server import serve
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs {error.name}: pip install 'mhesa[serve]'") from error
    from mhesa.export.checks import check_finite
    from mhesa.model.loading import load

    limits = Limits(max_tokens=given.pop("max_tokens"), request_seconds=given.pop("timeout"))
    name = given.pop("name") or folder.absolute().name
    settings = Settings(
        name=name,
        keys=read_keys(keys) if keys else {},
        allow_origins=tuple(allow_origin or ()),
        limits=limits,
        **given,
    )
    model, tokenizer = load(folder, device=device, backend=backend)
    if settings.sessions is not None:
        check_outputs([settings.sessions], [*folder.iterdir(), *([keys] if keys else [])])
    check_finite(model)
    gc.enable()
    serve(Service(model, tokenizer, settings, quantize))
