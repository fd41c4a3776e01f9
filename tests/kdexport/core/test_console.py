import errno
import io
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from kdexport.core.console import fail, guarded, new_console, print_answer, storage_error, verdict_style
from kdexport.core.progress import Reporter
from kdexport.core.stopping import Stopped
from kdexport.core.tables import Table, terminal_table
from kdexport.errors import ConfigError
from tests.answers import checked_answer


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(130)])
def test_an_interrupted_command_says_that_it_can_be_continued(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        # The command line library turns the one into the other.
        raise error

    with pytest.raises(SystemExit) as left:
        guarded(app)
    assert left.value.code == 130
    said = "Run the same command again; finished steps of a build and epochs of a training are kept.\n"
    assert capsys.readouterr().err == f"error KDX410: Interrupted by Ctrl-C.\n{said}"


def test_an_interrupted_command_with_json_prints_its_object(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["kdexport", "verify", "--json"])
    with pytest.raises(SystemExit):
        guarded(lambda: sys.exit(130))
    assert checked_answer(capsys.readouterr().out, 130)["error"]["code"] == "KDX410"


def test_a_full_disk_names_its_place_and_a_full_folder_of_temporary_files_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/data/out/bundle")
    found = storage_error(full)
    assert found.message == "/data/out/bundle: No space left on device."
    assert "TMPDIR" not in found.remedy
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = storage_error(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "kdexport-verify-1")))
    assert "set TMPDIR to a folder that can be written" in found.remedy


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_copy_onto_a_full_disk_names_the_target(number: int) -> None:
    error = OSError(number, "No room", "/bundle/model.onnx", None, "/repository/model.onnx")
    assert storage_error(error).message == "/repository/model.onnx: No room."


def test_a_copy_that_cannot_read_names_the_source() -> None:
    error = OSError(errno.EACCES, "Permission denied", "/bundle/model.onnx", None, "/repository/model.onnx")
    assert storage_error(error).message == "/bundle/model.onnx: Permission denied."
    assert storage_error(OSError(errno.EIO, "Input/output error")).message == "Input/output error."


def test_a_copied_folder_names_the_first_file_that_failed(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_bytes(b"1")

    def copy(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", source, None, target)

    with pytest.raises(shutil.Error) as caught:
        shutil.copytree(tmp_path / "source", tmp_path / "target", copy_function=copy)
    assert storage_error(caught.value).message == f"{tmp_path / 'target' / 'a'}: No space left on device."


@pytest.mark.parametrize(("stop", "code"), [(Stopped(signal.SIGTERM), 143), (KeyboardInterrupt(), 130)])
def test_a_stop_that_a_library_reports_as_its_own_error_is_still_a_stop(
    stop: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def export() -> None:
        try:
            try:
                raise stop
            except BaseException as error:
                raise ValueError("graph") from error
        except ValueError as error:
            raise RuntimeError("export failed") from error

    with pytest.raises(SystemExit) as ended:
        guarded(export)
    assert ended.value.code == code
    assert "KDX410" in capsys.readouterr().err


def test_other_exit_codes_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        guarded(lambda: sys.exit(3))
    assert left.value.code == 3
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Both streams, from here on: pytest takes them again between a fixture and its test."""
    screen = Terminal()
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "100")):
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


HOSTILE = "pip install 'kdexport[plots]' [red]net:train:[/red] [/] \\[x]"


def test_a_console_prints_text_as_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    new_console().print(HOSTILE, soft_wrap=True)
    new_console().print(terminal_table(Table(header=("[b]a", "b"), rows=((HOSTILE, "FAILS"),))))
    Reporter().say(HOSTILE)
    said = capsys.readouterr()
    assert said.out.count(HOSTILE) == 2
    assert "[b]a" in said.out
    assert said.err == f"{HOSTILE}\n"
    assert "\x1b" not in said.out


def test_progress_on_a_terminal_prints_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with Reporter().stage("verify [x]") as progress:
        progress(HOSTILE[:40])
    assert HOSTILE[:40] in terminal.getvalue()
    assert "verify [x]" in terminal.getvalue()


def test_verdicts_have_colours_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    table = terminal_table(Table(header=("", ""), rows=(("A", "holds, undecided"), ("B", "FAILS"))))

    def shown() -> str:
        terminal.truncate(0)
        new_console().print(table)
        new_console().print("Verdict: x", style=verdict_style(3))
        with pytest.raises(SystemExit):
            fail(ConfigError("[m]", remedy="r"))
        return terminal.getvalue()

    coloured = shown()
    assert "\x1b[32mholds, undecided\x1b[0m" in coloured
    assert "\x1b[1;31mFAILS " in coloured
    assert "\x1b[33mVerdict: x\x1b[0m" in coloured
    assert "\x1b[1;31merror KDX100:\x1b[0m" in coloured
    assert coloured.endswith("[m]\nr\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in shown()
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b" not in shown()


def test_consoles_are_made_in_one_place() -> None:
    root = Path(__file__).parents[3]
    own = re.compile(r"(?<![\w.])Console\(|rich import print|\.from_markup\(|\bTextColumn\((?!.*markup=False)")
    sources = [path for folder in ("kdexport", "training") for path in (root / folder).rglob("*.py")]
    made = [str(path.relative_to(root)) for path in sources if own.search(path.read_text())]
    assert made == ["kdexport/core/console.py"]


def test_a_second_error_after_the_answer_is_not_a_second_object(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server answers when it is ready, and may be stopped by an error later."""
    monkeypatch.setattr(sys, "argv", ["kdexport", "serve", "--json"])

    def app() -> None:
        print_answer({"url": "http://127.0.0.1:1"})
        raise ConfigError("later", remedy="r")

    with pytest.raises(SystemExit) as left:
        guarded(app)
    said = capsys.readouterr()
    assert (left.value.code, len(said.out.splitlines())) == (2, 1)
    assert "later" in said.err
