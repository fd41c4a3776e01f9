"""What can be set for a method, read by its name."""

import subprocess
import sys
from pathlib import Path

import pytest

from training import distillers
from training.distillers.settings import DistillerSettings, PlainSettings, settings_model

METHOD = """
from typing import Literal

from training.distillers import DISTILLERS
from training.distillers.distiller import Distiller
from training.distillers.settings import DistillerSettings, Positive, method_settings

@method_settings
class EchoSettings(DistillerSettings):
    name: Literal["echo"] = "echo"
    delay: Positive = 2.0

@DISTILLERS.register("echo")
class Echo(Distiller):
    pass
"""


def test_a_method_of_one_file_in_the_package_brings_its_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "echo.py").write_text(METHOD)
    code = (
        "import sys; from training import distillers; distillers.__path__.append(sys.argv[1])\n"
        "from training.distillers.settings import settings_model\n"
        "print(settings_model('echo')(name='echo').delay, 'echo' in distillers.DISTILLERS.names())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2.0", "True"]


@pytest.mark.parametrize("name", ["nothing", "no such name", "../kd", ""])
def test_an_unknown_name_has_the_common_settings(name: str) -> None:
    assert settings_model(name) is DistillerSettings


def test_reading_the_settings_of_plain_training_imports_no_torch() -> None:
    assert settings_model("plain") is PlainSettings
    code = (
        "from training.distillers.settings import settings_model; import sys\n"
        "settings_model('plain'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert distillers.DISTILLERS.names()
