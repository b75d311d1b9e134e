"""`mhesa config`."""

from __future__ import annotations

import typer

from mhesa.cli.common import Run


def config(folder: Run) -> None:
    """Print the settings that a run was trained with, as YAML that --config takes.

    Example:

        mhesa config runs/first > first.yaml
    """
    from mhesa.training import TrainingSettings
    from mhesa.training.config import dump_config
    from mhesa.training.settings import SETTINGS

    typer.echo(dump_config(TrainingSettings.load(folder / SETTINGS)), nl=False)
