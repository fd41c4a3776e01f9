"""Commands that a signal stops: what they print, their exit code, and what is left of them."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kdexport.core.stopping import Stopped, stoppable
from tests.answers import checked_answer
from tests.processes import is_running, not_ignored, wait_until

#: A command with a temporary folder and a child process that has one too.
COMMAND = """
import sys
from kdexport.core.child import call
from kdexport.core.console import guarded
from kdexport.core.files import scratch_folder

def main():
    with scratch_folder("outer"):
        call("waiting", [], timeout_s=300)

guarded(main)
"""

CHILD = """
import os, time
from kdexport.core.files import scratch_folder

with scratch_folder("inner") as folder:
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "ready").touch()
    time.sleep(300)
"""


def running(tmp_path: Path, *arguments: str) -> tuple["subprocess.Popen[str]", Path, int]:
    """The command when its child waits, the folder of temporary files, and the process of the child."""
    (tmp_path / "waiting.py").write_text(CHILD)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(scratch)}, start_new_session=True,
        preexec_fn=not_ignored,
    )  # fmt: skip
    wait_until(lambda: bool(list(scratch.glob("kdexport-inner-*/ready"))), 30)
    return process, scratch, int(next(scratch.glob("kdexport-inner-*/pid")).read_text())


@pytest.mark.parametrize(
    ("number", "name", "exit_code"),
    [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143), (signal.SIGHUP, "SIGHUP", 129)],
)
def test_a_stopped_command_says_so_and_leaves_no_folder_and_no_child(
    number: signal.Signals, name: str, exit_code: int, tmp_path: Path
) -> None:
    process, scratch, child = running(tmp_path, "--json")
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == exit_code
    remedy = "Run the same command again; finished steps of a build and epochs of a training are kept."
    assert stderr == f"error KDX410: Interrupted by {name}.\n{remedy}\n"
    error = {"code": "KDX410", "message": f"Interrupted by {name}.", "remedy": remedy}
    assert checked_answer(stdout, exit_code)["error"] == error
    assert list(scratch.iterdir()) == []
    assert not is_running(child)


def test_ctrl_c_on_a_terminal_reaches_the_child_too_and_is_said_once(tmp_path: Path) -> None:
    process, scratch, child = running(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout, stderr.count("Interrupted")) == (130, "", 1)
    assert "Traceback" not in stderr
    assert list(scratch.iterdir()) == []
    assert not is_running(child)


def interrupted_twice(cleaned: list[bool]) -> None:
    with stoppable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            cleaned.append(True)


def test_a_signal_that_comes_twice_does_not_interrupt_the_cleaning() -> None:
    cleaned: list[bool] = []
    with pytest.raises(Stopped) as caught:
        interrupted_twice(cleaned)
    assert cleaned
    assert caught.value.exit_code == 143


def test_handlers_are_restored_and_ignored_signals_stay_ignored() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) not in before
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    finally:
        signal.signal(signal.SIGHUP, former)


def test_temporary_folders_have_the_name_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdexport.core.files import scratch_folder

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder("thing") as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith("kdexport-thing-")
    assert list(tmp_path.iterdir()) == []
