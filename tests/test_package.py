"""What importing the package does, and does not."""

import subprocess
import sys

import pytest


def test_import_loads_torch_and_no_more():
    code = (
        "import sys, mhesa\n"
        "heavy = {'numba', 'triton', 'transformers', 'scipy', 'matplotlib', 'typer'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_training_is_there_when_asked_for():
    import mhesa
    import mhesa.training.run

    assert mhesa.train is mhesa.training.run.train
    assert mhesa.TrainingSettings is mhesa.training.settings.TrainingSettings
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mhesa.nothing  # noqa: B018
