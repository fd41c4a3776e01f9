import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kdexport.bundle.manifest import changed_files, read_manifest
from kdexport.bundle.slim_form import is_slim, write_slim
from kdexport.errors import BundleError, KdexportError, NotExecutedError, OutputError, VerificationError
from kdexport.verify.verdict import replay
from tests.conftest import Built, Command, run_command


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_slim_bundle_has_what_runs_and_nothing_that_only_verification_reads(built: Built, tmp_path: Path) -> None:
    written = write_slim(built.bundle, tmp_path / "slim")
    kept = names(tmp_path / "slim")
    whole = names(built.bundle)
    assert kept <= whole
    assert {"manifest.json", "model.onnx", "golden/logits.safetensors", "golden/000.png"} <= kept
    assert "targets/trt-rtx-fp16/model.plan" in kept
    missing = {"unfused.safetensors", "student.safetensors", "report.html", "targets/onnx-fp32/model.onnx"}
    assert not missing & kept
    assert missing <= set(written.left_out)
    assert kept | set(written.left_out) >= whole - {"model.sig"}
    assert all((tmp_path / "slim" / name).read_bytes() == (built.bundle / name).read_bytes()
               for name in kept - {"manifest.json"})  # fmt: skip
    manifest = read_manifest(tmp_path / "slim")
    assert is_slim(manifest)
    assert not changed_files(tmp_path / "slim", manifest.files)
    digest = hashlib.sha256((built.bundle / "manifest.json").read_bytes()).hexdigest()
    assert manifest.data["slim"]["manifest_sha256"] == digest
    assert written.bytes == sum((tmp_path / "slim" / name).stat().st_size for name in kept) < written.whole_bytes


def test_doctor_accepts_it_and_verify_says_what_it_lacks(built: Built, here: Command, tmp_path: Path) -> None:
    assert here("slim", built.bundle, "--out", tmp_path / "slim", "--target", "onnx-fp32", "--json").answer["ok"]
    assert not (tmp_path / "slim" / "targets").exists()
    doctor = here("doctor", tmp_path / "slim")
    assert doctor.exit_code == 0, doctor.stdout + doctor.stderr
    for command in (["verify"], ["verify", "--rung", "A"], ["replay"]):
        done = here(command[0], tmp_path / "slim", *command[1:])
        assert done.exit_code == 3
        assert "is a slim bundle" in done.stderr
        assert "kdexport doctor" in done.stderr
    with pytest.raises(NotExecutedError):
        replay(tmp_path / "slim", read_manifest(tmp_path / "slim"), lambda _: None)


def test_a_changed_bundle_a_failed_one_and_a_slim_one_are_not_made_slim(bundle_copy: Path, tmp_path: Path) -> None:
    write_slim(bundle_copy, tmp_path / "slim")
    with pytest.raises(BundleError, match="slim bundle already"):
        write_slim(tmp_path / "slim", tmp_path / "twice")
    with pytest.raises(KdexportError, match="no target 'onnx-int8'"):
        write_slim(bundle_copy, tmp_path / "other", ["onnx-int8"])
    data = json.loads((bundle_copy / "manifest.json").read_text())
    data["parity"][3]["holds"] = False
    (bundle_copy / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="is not verified"):
        write_slim(bundle_copy, tmp_path / "other")
    (bundle_copy / "model.onnx").write_bytes(b"other")
    with pytest.raises(VerificationError, match=r"model\.onnx changed"):
        write_slim(bundle_copy, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir() if "slim" in path.name or "other" in path.name) == ["slim"]


def test_only_a_slim_bundle_is_replaced(built: Built, tmp_path: Path) -> None:
    write_slim(built.bundle, tmp_path / "slim")
    write_slim(built.bundle, tmp_path / "slim", ["onnx-fp32"])
    assert list(read_manifest(tmp_path / "slim").targets) == ["onnx-fp32"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OutputError):
        write_slim(built.bundle, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_commands_that_write_one_slim_bundle_at_once_wait_for_each_other(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "slim"
    with ThreadPoolExecutor(3) as pool:
        for done in pool.map(lambda _: run_command("slim", built.bundle, "--out", out), range(3)):
            assert done.exit_code == 0, done.stderr
    assert not changed_files(out, read_manifest(out).files)
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]
