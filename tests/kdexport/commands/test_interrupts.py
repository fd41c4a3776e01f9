"""Real commands that SIGTERM or Ctrl-C stops in the middle."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.answers import checked_answer
from tests.conftest import Built
from tests.processes import not_ignored, wait_until


@pytest.mark.parametrize(
    ("arguments", "number", "exit_code"),
    [
        (("verify", "BUNDLE"), signal.SIGTERM, 143),
        (("gate", "BUNDLE", "--baseline", "BUNDLE"), signal.SIGINT, 130),
    ],
)
def test_a_stopped_command_leaves_no_temporary_folder_and_answers_in_json(
    arguments: tuple[str, ...], number: signal.Signals, exit_code: int, built: Built, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "kdexport", *arguments, "--json"]
    process = subprocess.Popen(
        [str(built.bundle) if word == "BUNDLE" else word for word in command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True, preexec_fn=not_ignored,
    )  # fmt: skip
    wait_until(lambda: bool(list(tmp_path.glob("kdexport-*"))), 120)
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code, stderr
    assert checked_answer(stdout, exit_code)["error"]["code"] == "KDX410"
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("kdexport-", "tmp"))] == []
