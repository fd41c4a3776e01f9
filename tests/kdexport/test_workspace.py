"""Results in the workspace that were damaged after they were made."""

import json
from pathlib import Path

import pytest

from kdexport.errors import StorageError
from kdexport.workspace import Making, Step, Workspace

KEY = "k" * 64


def make(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "part" / "a.bin").write_bytes(b"\x01" * 100)
    (folder / "b.json").write_text("{}")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The folder of a finished result."""
    return Workspace(tmp_path / "w s").produce("stage", KEY, make)


def refused(folder: Path) -> StorageError:
    # Another process: what one has compared, it does not compare again.
    with pytest.raises(StorageError) as caught:
        Workspace(folder.parents[1]).produce("stage", KEY, make)
    return caught.value


def test_a_changed_file_is_named_with_what_to_type(made: Path) -> None:
    (made / "part" / "a.bin").write_bytes(b"\x01" * 99 + b"\x02")
    error = refused(made)
    assert error.message == f"The stored result {made} is damaged: part/a.bin changed since it was made."
    assert f"`rm -r '{made}'`" in error.remedy
    assert "--fresh" in error.remedy
    assert error.exit_code == 4


def test_a_missing_file_and_damaged_digests_are_named(made: Path) -> None:
    (made / "b.json").unlink()
    assert "b.json is missing" in refused(made).message
    listed = made.parent / f".sha256-{KEY}.json"
    for text in ("", "{", "3", '{"b.json": 1}', "\xff"):
        listed.write_text(text)
        assert f"{made} is damaged" in refused(made).message


def test_what_the_remedy_says_makes_the_result_again(made: Path) -> None:
    import shutil

    (made / "b.json").write_text("changed")
    refused(made)
    shutil.rmtree(made)
    again = Workspace(made.parents[1])
    assert (again.produce("stage", KEY, make) / "b.json").read_text() == "{}"
    (made / "b.json").write_text("changed")
    Workspace(made.parents[1]).forget("stage", KEY)
    assert list(made.parent.glob("*.json")) == []
    assert (Workspace(made.parents[1]).produce("stage", KEY, make) / "b.json").read_text() == "{}"


def test_a_part_of_a_result_is_compared_alone(made: Path) -> None:
    (made / "b.json").write_text("changed")
    workspace = Workspace(made.parents[1])
    assert workspace.finished("stage", KEY, "part") == made / "part"
    assert workspace.finished("stage", KEY, "part/a.bin") == made / "part" / "a.bin"
    with pytest.raises(StorageError, match=r"b\.json changed"):
        workspace.finished("stage", KEY)


def test_a_result_of_an_earlier_version_without_digests_is_taken_as_it_is(made: Path) -> None:
    (made.parent / f".sha256-{KEY}.json").unlink()
    (made / "b.json").write_text("changed")
    assert Workspace(made.parents[1]).produce("stage", KEY, make) == made


def test_a_result_that_cannot_be_read_is_named_too(tmp_path: Path) -> None:
    def fill(making: Making) -> None:
        (making.folder / "value.json").write_text("{}")

    step = Step(
        stage="odd", made_of=(), make=fill, read=lambda folder: json.loads((folder / "value.json").read_text())["x"]
    )
    with pytest.raises(StorageError, match=r"odd/.* is damaged: it cannot be read \(KeyError: 'x'\)"):
        step.result(Workspace(tmp_path))


def test_a_long_run_that_continued_has_digests_too(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with pytest.raises(RuntimeError):
        workspace.resume("train", KEY, lambda folder: (_ for _ in ()).throw(RuntimeError("killed")))
    folder = workspace.resume("train", KEY, make)
    (folder / "part" / "a.bin").write_bytes(b"")
    with pytest.raises(StorageError, match=r"part/a\.bin changed"):
        Workspace(tmp_path).resume("train", KEY, make)
