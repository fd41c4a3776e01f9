import errno
import json
import sys
import tempfile
from pathlib import Path

import pytest

from kdexport.core.console import guarded, storage_error


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
    data = json.loads(capsys.readouterr().out)
    assert (data["ok"], data["exit_code"], data["error"]["code"]) == (False, 130, "KDX410")


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


def test_other_exit_codes_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        guarded(lambda: sys.exit(3))
    assert left.value.code == 3
    assert capsys.readouterr().err == ""
