"""A damaged file of a bundle is named by each command that reads the bundle, with exit code 1 and no crash."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdexport.bundle.manifest import read_manifest
from kdexport.diagnose import bisect
from kdexport.verify import verdict
from kdexport.verify.verdict import replay
from tests.conftest import Command

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "last byte": lambda content: content[:-1] + bytes([content[-1] ^ 0xFF]),
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
}


class ForeignError(Exception):
    """What a library raises that no check expects."""


def unexpected(*_: object, **__: object) -> object:
    raise ForeignError("wrong wire type")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def damaged(folder: Path) -> Iterator[str]:
    """Each file of a bundle except the manifest, once with each damage; the file is restored afterwards."""
    names = [name for name in files(folder) if name != "manifest.json"]
    assert len(names) > 15
    for name in names:
        content = (folder / name).read_bytes()
        for change in DAMAGES.values():
            (folder / name).write_bytes(change(content))
            yield name
        (folder / name).write_bytes(content)


def test_each_damaged_file_is_a_failed_check_of_verify_whatever_its_reader_raises(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "student_checks", unexpected)
    monkeypatch.setattr(verdict, "check_golden", unexpected)
    monkeypatch.setattr(verdict, "stored_task", unexpected)
    for name in damaged(bundle_copy):
        found = replay(bundle_copy, read_manifest(bundle_copy), lambda _: None).failures
        assert (found[0].name, found[0].detail) == ("sha256", f"{name} changed")
        if not name.startswith("golden/0"):
            facts = {check.subject: check.detail for check in found[1:]}
            assert facts["student"] == "cannot be checked: ForeignError: wrong wire type"
            assert facts["images"] == facts["student"] == facts["metrics/validation.safetensors"]


def test_two_graphs_with_one_changed_byte_each_are_failed_checks_beside_all_others(bundle_copy: Path) -> None:
    """The last byte lies in a text of the metadata, which onnx reads without an error and decodes with one."""
    names = ("model.onnx", "targets/trt-rtx-fp16/model.onnx")
    for name in names:
        path = bundle_copy / name
        path.write_bytes(DAMAGES["last byte"](path.read_bytes()))
    result = replay(bundle_copy, read_manifest(bundle_copy), lambda _: None)
    facts = {check.subject: check.detail for check in result.failures}
    assert facts["bundle"] == "model.onnx changed, targets/trt-rtx-fp16/model.onnx changed"
    assert all(facts[name].startswith("cannot be checked: UnicodeDecodeError: ") for name in names)
    assert "targets/onnx-fp32/model.onnx" in {check.subject for check in result.checks if check.holds}


def test_inspect_and_doctor_name_each_damaged_file(bundle_copy: Path, here: Command) -> None:
    for name in damaged(bundle_copy):
        for command in ("inspect", "doctor"):
            done = here(command, bundle_copy)
            assert done.exit_code == 1
            assert done.stderr.startswith("error KDX330: 1 files of ")
            assert f": {name} changed.\n" in done.stderr


def test_inspect_prints_one_json_object_for_a_damaged_bundle(bundle_copy: Path, here: Command) -> None:
    (bundle_copy / "report.md").write_text("")
    done = here("inspect", bundle_copy, "--json")
    assert done.exit_code == 1
    assert done.error["message"] == f"1 files of {bundle_copy} differ from the manifest: report.md changed."


@pytest.mark.parametrize("bisection", [unexpected, lambda *_: None])
def test_explain_failure_names_each_damaged_file(
    bisection: Callable[..., object],
    bundle_copy: Path,
    tmp_path: Path,
    here: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bisect, "explain", bisection)
    for name in damaged(bundle_copy):
        done = here("explain-failure", bundle_copy, "--out", tmp_path / "blame")
        assert done.exit_code == 1, done.stderr
        assert done.stdout == (
            f"Blamed: stage files: {name} differs from the manifest ({name} changed): copy the bundle again, or build "
            "it again.\n"
        )


@pytest.mark.parametrize("command", ["verify", "inspect", "doctor", "explain-failure"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_named_by_every_command(
    damage: str, command: str, bundle_copy: Path, here: Command
) -> None:
    path = bundle_copy / "manifest.json"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    done = here(command, bundle_copy)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error KDX203: {path} is damaged or was written by ")
