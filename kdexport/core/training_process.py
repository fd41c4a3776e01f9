"""How the package ``training`` is found and started: always ours, whatever the user's folder or environment has.

In a checkout it lies beside ``kdexport``, in an installed package inside of it, because ``training`` is a likely name
of a user's own package.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from kdexport.errors import BackendUnavailableError

#: Name of the program in help and usage, if a user did not start the package itself.
PROGRAM = "KDEXPORT_PROGRAM"

_PACKAGE = Path(__file__).parents[1]


def training_folder(package: Path = _PACKAGE) -> Path:
    """The folder that has the package ``training`` and nothing else to import by accident, or that of the checkout."""
    for folder in (package / "shipped", package.parent):
        if (folder / "training" / "recipes").is_dir():
            return folder
    raise BackendUnavailableError(
        f"The training package is missing from {package}.",
        remedy="Reinstall kdexport: pip install --force-reinstall kdexport.",
    )


def training_environment() -> dict[str, str]:
    """What a process that imports ``training`` needs beside our environment; it must not import from its folder."""
    given = os.environ.get("PYTHONPATH")
    places = [str(training_folder()), *([given] if given else [])]
    return {"PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"}


def become_training(command: str, arguments: Sequence[str]) -> NoReturn:
    """Run ``command`` of the training package in place of this process, with its output, signals and exit code."""
    environment = {**os.environ, **training_environment(), PROGRAM: "kdexport"}
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.execve(sys.executable, [sys.executable, "-P", "-m", "training", command, *arguments], environment)  # noqa: S606
