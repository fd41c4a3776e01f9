"""Files that are written by commands."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from kdexport.core.files import (
    exclusive,
    recover,
    remove_partials,
    replace_folder,
    require_writable_file,
    scratch_folder,
    write_bytes,
    write_file,
    write_folder,
    write_text,
    writing,
)
from kdexport.errors import OutputError, StorageError


def test_a_report_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    require_writable_file(None)
    require_writable_file(tmp_path / "new.xml")
    for path in (tmp_path, tmp_path / "missing" / "new.xml"):
        with pytest.raises(OutputError):
            require_writable_file(path)


def test_a_system_without_locks_on_folders_is_refused_and_told_what_runs_kdexport(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(StorageError) as caught, exclusive(tmp_path):
        pass
    assert str(caught.value) == (
        "kdexport runs on Linux and macOS: this system has no locks on folders (flock).\n"
        "On Windows, run kdexport in WSL 2 or in a Linux container."
    )
    assert caught.value.exit_code == 4


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def broken_write(partial: Path) -> None:
    partial.write_text("half of")
    raise OSError(errno.ENOSPC, "No space left on device", str(partial))


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    write_text(path, "gr\u00fcn\n")
    assert path.read_bytes() == "gr\u00fcn\n".encode()
    with pytest.raises(OSError, match="No space left"):
        write_file(path, broken_write)
    assert path.read_bytes() == "gr\u00fcn\n".encode()
    write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["report.md"]


def test_a_kill_in_the_middle_leaves_the_file_as_it_was_and_what_is_left_can_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    path.write_text("whole")
    code = "import os, sys; from pathlib import Path; from kdexport.core.files import write_file; "
    code += "write_file(Path(sys.argv[1]), lambda path: (path.write_text('ha'), os.kill(os.getpid(), 9)))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_text() == "whole"
    assert len(names(tmp_path)) == 2
    remove_partials(tmp_path)
    assert names(tmp_path) == ["state.bin"]


def test_partials_of_this_name_alone_are_removed(tmp_path: Path) -> None:
    kept = {".partial-notes", "a.partial-7", ".a.partial-x", ".a.partial"}
    for name in kept | {".a.partial-7"}:
        (tmp_path / name).touch()
    remove_partials(tmp_path)
    assert set(names(tmp_path)) == kept


def test_a_folder_takes_the_place_of_another_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "best"

    def make(folder: Path, text: str) -> None:
        folder.mkdir()
        (folder / "weights").write_text(text)

    write_folder(target, lambda folder: make(folder, "one"))
    write_folder(target, lambda folder: make(folder, "two"))

    def make_half(folder: Path) -> None:
        make(folder, "three")
        broken_write(folder / "index")

    with pytest.raises(OSError, match="No space left"):
        write_folder(target, make_half)
    assert (target / "weights").read_text() == "two"
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["best", "best/weights"]


def test_a_kill_between_the_two_renames_is_recovered_from(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (target / "old").touch()
    code = "import os, sys; from pathlib import Path; from kdexport.core import files; "
    code += "files.publish = lambda *_: os.kill(os.getpid(), 9); files.replace_folder(*map(Path, sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, str(source), str(target)], check=False)
    assert done.returncode == -9
    assert not target.exists()
    recover(target)
    assert names(target) == ["old"]


def full(_: Path) -> None:
    # What writing raises: an error without a file name.
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_what_was_to_be_written(tmp_path: Path) -> None:
    for write in (write_file, write_folder):
        with pytest.raises(OSError, match="No space left") as caught:
            write(tmp_path / "result", full)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "result"))
    # The innermost place counts: the folder of temporary files may be on another disk.
    with (
        pytest.raises(OSError, match="No space left") as caught,
        writing(tmp_path / "out"),
        scratch_folder("x") as folder,
    ):
        full(folder)
    assert caught.value.filename == str(folder)
    assert list(tmp_path.iterdir()) == []


def test_copying_onto_a_full_disk_names_the_target_and_not_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.onnx").write_bytes(b"x")

    def copy(given: str, made: str, **_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(given), None, str(made))

    monkeypatch.setattr("shutil.copy2", copy)
    monkeypatch.setattr("shutil.copytree.__defaults__", (False, None, copy, False, False))
    with pytest.raises(OSError, match="No space left") as caught:
        replace_folder(source, tmp_path / "target")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "target"))
    assert not (tmp_path / "target").exists()


def test_other_errors_keep_the_file_that_they_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, writing(tmp_path):
        (tmp_path / "nowhere").read_text()
    assert caught.value.filename == str(tmp_path / "nowhere")
    with pytest.raises(ConnectionRefusedError) as refused, writing(tmp_path):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    assert refused.value.filename is None
