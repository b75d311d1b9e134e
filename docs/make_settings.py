"""Print docs/settings.md: `python docs/make_settings.py > docs/settings.md`."""

from __future__ import annotations

from collections.abc import Iterable

from mhesa.inference.sampling_settings import Sampling
from mhesa.model.config import JSON_NAMES, ModelConfig
from mhesa.serve.settings import Limits, Settings
from mhesa.settings import Setting, settings_of
from mhesa.training.settings import PANELS, TrainingSettings

NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", tuple: "list of texts"}


def main() -> None:
    """Print the page."""
    print("# Settings\n\nThis page is made by `python docs/make_settings.py > docs/settings.md`.")
    print(
        "\n## Training\n\nFields of `mhesa.TrainingSettings`, options of `mhesa train` (`batch_size` is "
        "`--batch-size`), and keys of the YAML file for its `--config`."
    )
    settings = settings_of(TrainingSettings)
    for panel in PANELS:
        print(f"\n### {panel}")
        table(setting for setting in settings if setting.doc.panel == panel)
    print(
        "\n## Sampling\n\nFields of `mhesa.Sampling`, with their defaults in Python. All but `logit_bias` "
        "are options of `mhesa generate`, where the temperature is 0.8 by default."
    )
    table(settings_of(Sampling))
    names = ", ".join(f"`{name}` is `{other}`" for name, other in JSON_NAMES.items())
    print(
        "\n## Models\n\nFields of `mhesa.model.config.ModelConfig`. "
        f"In `config.json` and `MhesaConfig`, {names}."
    )
    table(settings_of(ModelConfig))
    print(
        "\n## Serving\n\nFields of `mhesa.serve.settings.Settings`. All but `limits` are options of "
        "`mhesa serve`: `name` may be left out there, `keys` is `--keys FILE`, and `allow_origins` is "
        "`--allow-origin`, which may be repeated."
    )
    table(settings_of(Settings))
    print(
        "\n### Limits\n\nFields of `mhesa.serve.settings.Limits`: the most that one request may have. "
        "`mhesa serve` sets `max_tokens` by `--max-tokens` and `request_seconds` by `--timeout`."
    )
    table(settings_of(Limits))


def table(settings: Iterable[Setting]) -> None:
    """Print a table of settings."""
    print("\n| name | value | default | meaning |\n|---|---|---|---|")
    for setting in settings:
        cells = (f"`{setting.name}`", _value(setting), _default(setting), setting.doc.text)
        print(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")


def _value(setting: Setting) -> str:
    if setting.doc.metavar:
        return f"`{setting.doc.metavar}`"
    kind, words = NAMES.get(setting.type, ""), setting.doc.range.words if setting.doc.range else ""
    if "number" in words or words.startswith("one of"):
        return words
    return f"{kind}, {words}" if words else kind


def _default(setting: Setting) -> str:
    if setting.required:
        return "required"
    if setting.default in (None, (), {}) or not isinstance(setting.default, str | int | float):
        return ""
    return f"`{str(setting.default).lower() if isinstance(setting.default, bool) else setting.default}`"


if __name__ == "__main__":
    main()
