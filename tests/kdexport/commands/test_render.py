"""What is printed for people to type next."""

import shutil
import sys
from pathlib import Path

import pytest

from kdexport.commands.render import _program


@pytest.mark.parametrize(
    ("started_as", "on_path", "typed"),
    [
        ("/opt/venv/bin/kdexport", True, "kdexport"),
        ("/opt/venv/bin/kdexport", False, "/opt/venv/bin/kdexport"),
        ("{here}/.venv/bin/kdexport", False, ".venv/bin/kdexport"),
        ("/opt/venv/lib/python3.12/site-packages/kdexport/__main__.py", False, "python3 -m kdexport"),
        ("{here}/kdexport/__main__.py", False, "python3 -m kdexport"),
    ],
)
def test_the_command_is_named_as_it_can_be_typed(
    started_as: str, on_path: bool, typed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [started_as.format(here=tmp_path), "build"])
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    monkeypatch.setattr(shutil, "which", lambda name: "/opt/venv/bin/kdexport" if on_path else None)
    assert _program() == typed
