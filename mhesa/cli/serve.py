"""`mhesa serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mhesa.cli.common import Backend, Device, Folder
from mhesa.errors import InputError


def serve(
    folder: Folder,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs --keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="API keys of clients: a 'name: key' a line.")
    ] = None,
    sessions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="SQLite file that keeps sessions; in memory only if omitted."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; the folder's name if omitted.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Texts written at the same time.")] = 1024,
    queue: Annotated[int, typer.Option(help="Texts that may wait for a slot.")] = 1024,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a text at most.")] = 4096,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600,
    quantize: Annotated[str | None, typer.Option(help="int8: a quarter of the memory to read.")] = None,
    device: Device = "cpu",
    backend: Backend = None,
) -> None:
    """Serve a model to any client of OpenAI's API, and a page to try it on.

    Examples:

        mhesa serve runs/first

        mhesa serve runs/first --host 0.0.0.0 --keys keys.txt --sessions sessions.sqlite
    """
    # Only to see whether they are there: it is the server that uses them.
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"serving needs {error.name}: pip install 'mhesa[serve]'") from error
    from mhesa.model.loading import load
    from mhesa.serve.api.service import Service
    from mhesa.serve.http.server import serve
    from mhesa.serve.settings import Limits, Settings, read_keys

    settings = Settings(
        name=name or folder.absolute().name,
        host=host,
        port=port,
        keys=read_keys(keys) if keys else {},
        sessions=sessions,
        slots=slots,
        queue=queue,
        limits=Limits(max_tokens=max_tokens, request_seconds=timeout),
    )
    model, tokenizer = load(folder, device=device, backend=backend)
    serve(Service(model, tokenizer, settings, quantize))
