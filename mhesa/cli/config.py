"""`mhesa config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mhesa.file_names import SETTINGS


def config(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a training run.")],
) -> None:
    """Print the settings of a training run as YAML, for `mhesa train --config`.

    Examples:

        mhesa config runs/first > first.yaml

        mhesa train --config first.yaml --out runs/second --seed 1
    """
    from mhesa.training.config import dump_config
    from mhesa.training.settings import TrainingSettings

    typer.echo(dump_config(TrainingSettings.load(folder / SETTINGS)), nl=False)
