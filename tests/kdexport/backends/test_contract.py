"""The contract of a backend: a new one is one file, and "verified" is earned by its own run."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kdexport.backends import BACKENDS, backend
from kdexport.backends.base import Backend, Execution, Finding, Missing, Runner
from kdexport.backends.ort import CUDA, load_model
from kdexport.bundle.manifest import MODEL, NOT_EXECUTED, TARGETS, VERIFIED, Manifest, read_golden, read_manifest
from kdexport.commands.render import show_verdict
from kdexport.errors import BackendUnavailableError, NotExecutedError
from kdexport.report.check_tables import failed_checks, not_run_checks
from kdexport.verify.compiled_again import CHECK
from kdexport.verify.target_checks import FileResult
from kdexport.verify.verdict import Verdict, replay, require_executed, target_runs, verify_folder
from tests.conftest import Built, Command, Outcome
from tests.kdexport.optional_packages import require_openvino

TOY = Path(__file__).with_name("toy_backend.py")


class OrtInDisguise(Runner):
    """The answers of a correct runtime, told by one that does not exist."""

    def __init__(self, path: Path) -> None:
        self.model = load_model(path)
        self.images = 0

    @property
    def execution(self) -> Execution:
        return Execution(runtime="disguise", version="0", device="nowhere")

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self.images += len(images)
        return self.model.logits(images)


def with_target(bundle: Path, name: str, folder: Path, *others: str) -> tuple[Path, Manifest]:
    """A copy of a bundle that holds ``name`` and ``others``, with the float32 graph, and no word on what ran them."""
    shutil.copytree(bundle, folder)
    data = json.loads((folder / "manifest.json").read_text())
    data["targets"] = {}
    for target in (name, *others):
        runtime, precision = backend(target.rpartition("-")[0]), target.rpartition("-")[2]
        place = folder / TARGETS / target
        if not place.is_dir():
            place.mkdir()
            shutil.copyfile(folder / MODEL, place / MODEL)
        data["targets"][target] = {
            "precision": precision, "backend": runtime.name, "engine": runtime.compiles, "status": NOT_EXECUTED,
            "form": runtime.form(precision),
        }  # fmt: skip
    for place in (folder / TARGETS).iterdir():
        if place.name not in data["targets"]:
            shutil.rmtree(place)
    return folder, Manifest.from_json(data)


def verified(folder: Path, manifest: Manifest) -> Verdict:
    return verify_folder(folder, manifest, read_golden(folder, manifest)[:3])


@pytest.mark.parametrize("name", [name for name in BACKENDS.names() if name != "toy"])
def test_no_target_is_verified_once_its_run_is_taken_away(
    name: str, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "openvino":
        require_openvino()
    runtime, target = backend(name), f"{name}-fp32"
    folder, manifest = with_target(built.bundle, target, tmp_path / "b")
    if runtime.compiles:
        # An engine's own runtime needs a GPU: another one answers in its place, as correctly as it would.
        opened = OrtInDisguise(folder / TARGETS / target / MODEL)
        monkeypatch.setattr(type(runtime), "open", lambda *_, **__: opened)
        monkeypatch.setattr(type(runtime), "audit", lambda *_: [])
        monkeypatch.setattr(type(runtime), "repeats_files", False)
        monkeypatch.setattr(type(runtime), "not_executable", lambda *_: None)
    with_run = verified(folder, manifest)
    assert with_run.failures == ()
    assert target in with_run.executed
    monkeypatch.setattr(type(runtime), "not_executable", lambda *_: Missing("it was taken away", "Bring it back"))
    without = verified(folder, manifest)
    assert without.failures == ()
    assert target not in without.executed
    # This bundle was put together without a build, so nothing binds a plan to its ONNX file.
    runs = [str(run).replace(", not bound to its ONNX file", "") for run in target_runs(manifest, without)]
    assert runs == [f"{target} never ran (built, not executed)"]


def test_what_this_machine_cannot_read_or_run_is_not_counted_as_checked(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine without the packages of the edge targets, whose files are not even files of their kinds.

    Their ONNX files are checked by the tests of the graphs.
    """
    monkeypatch.setattr("kdexport.verify.verdict.graph_checks", lambda *_: FileResult(()))
    for package in ("ai_edge_litert", "coremltools", "executorch", "ncnn", "openvino"):
        for name in {package, *(name for name in sys.modules if name.startswith(f"{package}."))}:
            monkeypatch.setitem(sys.modules, name, None)
    # What ncnn's files contain is read without ncnn.
    monkeypatch.setattr(type(backend("ncnn")), "audit", lambda *_: [])
    edge = ("litert-fp32", "coreml-fp32", "executorch-fp32", "ncnn-fp32", "openvino-fp32")
    folder, manifest = with_target(built.bundle, edge[0], tmp_path / "b", *edge[1:])
    for name in edge:
        path = folder / TARGETS / name / backend(name.partition("-")[0]).artifact
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not read")
    verdict = verified(folder, manifest)
    assert (verdict.failures, verdict.executed) == ((), {})
    told = {(check.subject.split("/")[1], check.name) for check in verdict.not_run}
    unread = {name for name, check in told if check == "content"}
    assert unread == {"litert-fp32", "coreml-fp32", "executorch-fp32"}
    assert {name for name, check in told if check == "execution"} == set(edge)
    assert {name for name, check in told if check == CHECK} == {*unread, "ncnn-fp32"}
    assert not any(check.holds or check.failed for check in verdict.not_run)
    runs = {run.target: run for run in target_runs(manifest, verdict)}
    for name in edge:
        assert runs[name].state == "never ran"
        assert ("content was not read on this machine" in str(runs[name])) == (name in unread)
        with pytest.raises(NotExecutedError, match=f"{name} never ran"):
            require_executed(list(runs.values()), [name])
    show_verdict(folder, manifest, verdict, list(runs.values()))
    said = " ".join(capsys.readouterr().out.split())
    counted = sum(check.rung not in "ABCD" for check in verdict.checks) - 12
    assert f"{counted} of {counted} hold, 12 did not run" in said
    assert f"all {len(verdict.checks) - 12} checks hold; 12 checks did not run; litert-fp32 never ran" in said
    # As a later reader of a manifest sees them.
    stored = [json.loads(json.dumps(check.to_json())) for check in verdict.checks]
    data = {**manifest.data, "parity": stored}
    Manifest.from_json(data)
    assert (failed_checks(data), len(not_run_checks(data))) == ([], 12)
    assert all((entry["holds"], entry["measured"]) == (False, None) for entry in not_run_checks(data))


def test_float16_of_onnxruntime_is_not_verified_by_a_run_on_the_cpu(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has a GPU, but no onnxruntime that reaches it."""
    from kdexport.graph.precision import cast_to_fp16

    monkeypatch.setattr("kdexport.backends.nvidia.gpu_fingerprint", lambda: ["NVRM 580.1", "Model: H100"])
    folder, manifest = with_target(built.bundle, "onnx-fp16", tmp_path / "b")
    cast_to_fp16(folder / MODEL, folder / TARGETS / "onnx-fp16" / MODEL)
    verdict = verified(folder, manifest)
    assert verdict.failures == ()
    assert verdict.executed == {}
    (told,) = (check for check in verdict.checks if check.name == "execution")
    assert told.subject == "targets/onnx-fp16/model.onnx on onnxruntime GPU"
    assert (told.ran, told.holds, told.failed) == (False, False, False)
    assert "not executed on this machine" in told.detail
    assert CUDA in told.detail


def test_a_runtime_that_cannot_be_opened_here_leaves_its_target_not_executed(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = backend("trt-rtx")
    folder, manifest = with_target(built.bundle, "trt-rtx-fp32", tmp_path / "b")

    def refuse(*_: Any, **__: Any) -> Runner:
        raise BackendUnavailableError("The driver is too old.", remedy="Update it.")

    monkeypatch.setattr(type(runtime), "open", refuse)
    monkeypatch.setattr(type(runtime), "audit", lambda *_: [])
    monkeypatch.setattr(type(runtime), "not_executable", lambda *_: None)
    verdict = verified(folder, manifest)
    assert (verdict.failures, verdict.executed) == ((), {})
    assert any("not executed on this machine: The driver is too old" in check.detail for check in verdict.checks)


def test_a_changed_status_does_not_pass_for_a_run(built: Built, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built.bundle, tmp_path / "b"))
    data = json.loads((folder / "manifest.json").read_text())
    data["targets"]["trt-rtx-fp16"]["status"] = VERIFIED
    (folder / "manifest.json").write_text(json.dumps(data))
    manifest = read_manifest(folder)
    runs = {run.target: run for run in target_runs(manifest, replay(folder, manifest, lambda _: None))}
    assert runs["onnx-fp32"].state == "ran here"
    assert runs["onnx-fp32"].fact.endswith("CPUExecutionProvider")
    assert runs["trt-rtx-fp16"].state == "ran at build"
    assert runs["trt-rtx-fp16"].fact == "runtime not recorded, according to the manifest"


def test_verify_can_require_that_targets_run(here: Command, built: Built) -> None:
    done = here("verify", built.bundle, "--require-executed", "onnx-fp32,trt-rtx-fp16", "--json")
    assert done.exit_code == 3
    assert done.error["message"] == (
        "1 of 2 required targets did not run in this verification: trt-rtx-fp16 never ran (built, not executed)."
    )
    assert here("verify", built.bundle, "--require-executed", "onnx-fp8").exit_code == 2


@pytest.fixture(scope="module")
def toy_bundle(built: Built, tmp_path_factory: pytest.TempPathFactory, kdexport: Command) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    done = build_toy(kdexport, built, folder / "bundle")
    assert done.exit_code == 0, done.stderr
    return folder / "bundle"


def build_toy(run: Command, built: Built, out: Path) -> Outcome:
    """Train and export nothing again: what is new is the target."""
    for stage in ("teacher", "train", "fuse", "export"):
        if (built.workspace / stage).is_dir():
            shutil.copytree(built.workspace / stage, out.parent / "ws" / stage)
    return run(
        "build", "--config", built.config, "--workspace", out.parent / "ws", "--out", out, "--target",
        "onnx-fp32,toy-fp32", "--plugin", TOY,
    )  # fmt: skip


def test_a_backend_of_one_file_is_built_and_verified_by_its_own_run(toy_bundle: Path) -> None:
    manifest = json.loads((toy_bundle / "manifest.json").read_text())
    entry = manifest["targets"]["toy-fp32"]
    assert (entry["status"], entry["engine"], entry["kernels"], entry["version"]) == (VERIFIED, True, 1, "1.0")
    assert entry["executed"] == {"runtime": "toy", "version": "1.0", "device": "abacus 0", "types": ["fp32"]}
    checks = {(check["rung"], check["name"]) for check in manifest["parity"] if "model.toy" in check["subject"]}
    assert {("audit", "format"), ("audit", "every bead in fp32"), ("B", "rms error"), ("D", "flips")} <= checks


def test_a_backend_of_one_file_is_listed_examined_verified_and_gated(toy_bundle: Path, plugged: Command) -> None:
    plugin = ("--plugin", TOY)
    assert "toy-fp32" not in plugged("list", "targets").stdout
    assert "toy-fp32" in plugged("list", "targets", *plugin).stdout
    assert "target toy-fp32" in plugged("doctor", *plugin).stdout
    done = plugged("verify", toy_bundle, "--require-executed", "toy-fp32", *plugin)
    assert done.exit_code == 0, done.stderr
    assert "toy 1.0, abacus 0" in done.stdout
    gated = plugged(
        "gate", toy_bundle, "--target", "toy-fp32", "--against", "onnx-fp32", "--max-slowdown", "90%", "--max-flips",
        "10%", "--json", *plugin,
    )  # fmt: skip
    assert gated.exit_code in (0, 3), gated.stdout
    assert "toy-fp32" in gated.stdout


def test_a_bundle_of_a_backend_without_its_plugin_says_what_to_pass(toy_bundle: Path, plugged: Command) -> None:
    done = plugged("verify", toy_bundle)
    assert done.exit_code == 2
    assert "toy-fp32" in done.stderr
    assert "--plugin" in done.stderr


def test_the_server_refuses_a_target_of_another_runtime(toy_bundle: Path, plugged: Command) -> None:
    done = plugged("serve", toy_bundle, "--target", "toy-fp32", "--plugin", TOY)
    assert done.exit_code == 4
    assert "with onnxruntime, not toy-fp32" in done.stderr


@pytest.mark.parametrize(("fault", "words"), [("wrong", "targets/toy-fp32/model.toy"), ("half", "beads in fp16")])
def test_a_backend_that_answers_wrongly_is_not_verified(
    fault: str, words: str, toy_bundle: Path, plugged: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_FAULT", fault)
    done = plugged("verify", toy_bundle, "--plugin", TOY)
    assert done.exit_code == 1, done.stderr
    assert words in done.stdout + done.stderr


def test_a_backend_that_is_gone_is_not_verified(
    toy_bundle: Path, plugged: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_FAULT", "gone")
    done = plugged("verify", toy_bundle, "--require-executed", "toy-fp32", "--plugin", TOY)
    assert done.exit_code == 3, done.stderr
    assert "1 of 1 required targets did not run in this verification: toy-fp32 ran at build" in done.stderr


def test_a_target_that_cannot_run_at_the_build_is_not_said_to_be_verified(built: Built) -> None:
    entry = json.loads((built.bundle / "manifest.json").read_text())["targets"]["trt-rtx-fp16"]
    assert entry["status"] == NOT_EXECUTED
    assert "executed" not in entry


def test_each_backend_says_what_it_is() -> None:
    for name in BACKENDS.names():
        runtime: Backend = backend(name)
        assert runtime.name == name
        assert runtime.title
        assert runtime.description
        assert runtime.compiles == (runtime.artifact != MODEL)
        for precision in runtime.precisions:
            missing = runtime.unavailable(precision)
            assert missing is None or (missing.reason[-1] != "." and missing.remedy[-1] != ".")
    assert Finding("a", True, "b").holds
