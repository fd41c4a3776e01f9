"""A Triton repository gets complete versions of the bundle, and files of others stay unchanged."""

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2

from kdexport.bundle.manifest import Manifest, hash_files, read_manifest
from kdexport.errors import (
    BackendUnavailableError,
    BundleError,
    ConfigError,
    KdexportError,
    OutputError,
    StorageError,
    VerificationError,
)
from kdexport.serving.triton import pbtxt, versions, writer
from kdexport.serving.triton.pbtxt import from_pbtxt
from kdexport.serving.triton.variants import TritonRequest, plan_export
from kdexport.serving.triton.writer import export_triton
from kdexport.verify.verdict import Verdict, VerifiedBundle, seal
from tests.conftest import Built, Command

BUILT_WITH = "10.13.2.6"


@pytest.fixture(scope="module")
def verified(built: Built) -> VerifiedBundle:
    """A bundle sealed without the checks, which take seconds; another test shows that the command makes them."""
    return seal(built.bundle, read_manifest(built.bundle), Verdict(()))


def resealed(bundle: VerifiedBundle, folder: Path, edit: Callable[[dict[str, Any]], object]) -> VerifiedBundle:
    """A copy of ``bundle`` at ``folder`` with a changed manifest, as if another build had verified it."""
    shutil.copytree(bundle.folder, folder)
    data = json.loads((folder / "manifest.json").read_text())
    edit(data)
    data["files"] = hash_files(folder)
    (folder / "manifest.json").write_text(json.dumps(data))
    return seal(folder, read_manifest(folder), Verdict(()))


def with_plan(data: dict[str, Any]) -> None:
    """As if the RTX engine had been built and run by TensorRT on a GPU."""
    data["targets"] = {
        "trt-fp16": {"precision": "fp16", "backend": "trt", "engine": True, "status": "verified", "version": BUILT_WITH}
    }


@pytest.fixture
def plan_bundle(verified: VerifiedBundle, tmp_path: Path) -> VerifiedBundle:
    folder = tmp_path / "plan"

    def edit(data: dict[str, Any]) -> None:
        with_plan(data)
        (folder / "targets" / "trt-rtx-fp16").rename(folder / "targets" / "trt-fp16")
        shutil.rmtree(folder / "targets" / "onnx-fp32")

    return resealed(verified, folder, edit)


#: Concatenated protobuf messages are merged, so appending this gives a valid model with other bytes.
LATER = onnx.ModelProto(doc_string="trained again").SerializeToString()


def change_model(folder: Path) -> None:
    path = folder / "targets" / "onnx-fp32" / "model.onnx"
    path.write_bytes(path.read_bytes() + LATER)


def retrained(verified: VerifiedBundle, folder: Path) -> VerifiedBundle:
    """The bundle with another model file of the same student."""
    return resealed(verified, folder, lambda _: change_model(folder))


def export(bundle: VerifiedBundle, repository: Path, **options: Any) -> writer.TritonResult:
    request = TritonRequest(repository=repository, **{"name": "mobilenetv2", **options})
    return export_triton(bundle, plan_export(bundle.manifest, request))


def config_of(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_command_verifies_and_writes_a_model_that_onnxruntime_runs_by_its_configuration(
    built: Built, here: Command, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    done = here("triton", built.bundle, "--repository", repository, "--name", "digits", "--instances", "3", "--json")
    assert done.exit_code == 0, done.stderr
    assert (done.data["version"], done.data["up_to_date"]) == (1, False)
    # It is measured: a power of two.
    assert done.data["max_batch"] in {1, 2, 4, 8, 16, 32, 64}
    model = repository / "digits"
    assert sorted(path.name for path in repository.iterdir()) == ["digits"]
    assert sorted(tree(model)) == sorted(
        ["1/kdexport.json", "1/model.onnx", "config.pbtxt", "labels.txt", f"warmup/{_warmup_name(model)}"]
    )
    config = config_of(model)
    assert config.max_batch_size == done.data["max_batch"]
    session = ort.InferenceSession(str(model / "1" / config.default_model_filename), providers=["CPUExecutionProvider"])
    (given,) = config.input
    raw = (model / "warmup" / config.model_warmup[0].inputs[given.name].input_data_file).read_bytes()
    image = np.frombuffer(raw, "<f4").reshape(1, *given.dims)
    (logits,) = session.run([config.output[0].name], {given.name: image})
    assert logits.shape[1:] == tuple(config.output[0].dims)


def _warmup_name(model: Path) -> str:
    (path,) = (model / "warmup").iterdir()
    return path.name


def test_the_configuration_has_the_values_of_the_bundle_and_the_options(
    verified: VerifiedBundle, tmp_path: Path
) -> None:
    result = export(
        verified, tmp_path / "models", name="n", instances=3, max_batch=5, delay_us=700, max_queue=11,
        queue_timeout_ms=90, keep_versions=4,
    )  # fmt: skip
    config = config_of(result.model)
    size, classes = verified.manifest.spec.image_size, verified.manifest.spec.num_classes
    assert (config.name, config.backend, config.platform) == ("n", "onnxruntime", "onnxruntime_onnx")
    assert config.max_batch_size == 5
    # Without the batch: Triton puts it in front.
    assert list(config.input[0].dims) == [3, size, size]
    assert list(config.output[0].dims) == [classes]
    assert {config.input[0].data_type, config.output[0].data_type} == {model_config_pb2.TYPE_FP32}
    (group,) = config.instance_group
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_CPU, 3)
    batching = config.dynamic_batching
    policy = batching.default_queue_policy
    assert batching.max_queue_delay_microseconds == 700
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (11, 90_000)
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert policy.allow_timeout_override
    assert config.version_policy.latest.num_versions == 4
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert [(sample.batch_size, list(sample.inputs)) for sample in config.model_warmup] == [
        (1, ["input"]),
        (5, ["input"]),
    ]
    assert (result.model / config.output[0].label_filename).read_text().split("\n")[:-1] == list(
        verified.manifest.spec.classes
    )


def recoloured(verified: VerifiedBundle, folder: Path) -> VerifiedBundle:
    """The bundle with a first golden image in which no channel, row or column equals another."""
    size = verified.manifest.spec.image_size
    noise = np.random.default_rng(3).integers(0, 256, (size, size, 3), np.uint8)
    return resealed(
        verified, folder, lambda data: Image.fromarray(noise).save(folder / data["golden"][0], format="PNG")
    )


def test_the_warm_up_is_a_golden_image_through_the_bundles_preprocessing(
    verified: VerifiedBundle, tmp_path: Path
) -> None:
    bundle = recoloured(verified, tmp_path / "bundle")
    model = export(bundle, tmp_path / "models").model
    spec = bundle.manifest.spec.preprocessing
    source = Image.open(bundle.folder / bundle.manifest.golden[0])
    assert source.size == (spec.image_size, spec.image_size) == (spec.resize, spec.resize)
    raw = (model / "warmup" / _warmup_name(model)).read_bytes()
    for channel, row, column in ((0, 0, 0), (1, 7, 30), (2, 31, 16)):
        offset = 4 * ((channel * spec.image_size + row) * spec.image_size + column)
        pixel = source.getpixel((column, row))
        assert isinstance(pixel, tuple)
        expected = (pixel[channel] / 255 - spec.mean[channel]) / spec.std[channel]
        assert struct.unpack_from("<f", raw, offset)[0] == pytest.approx(expected, abs=1e-6)
    assert len(raw) == 4 * 3 * spec.image_size**2


def test_a_new_warm_up_image_replaces_the_old_one(verified: VerifiedBundle, tmp_path: Path) -> None:
    model = export(verified, tmp_path / "models").model
    before = _warmup_name(model)
    export(recoloured(verified, tmp_path / "bundle"), tmp_path / "models")
    assert _warmup_name(model) != before
    assert config_of(model).model_warmup[0].inputs["input"].input_data_file == _warmup_name(model)


def test_an_unknown_field_or_a_wrong_type_in_a_configuration_is_refused() -> None:
    for text in ('nme: "x"', "max_batch_size: many", 'input { dims: ["3"] }', "\x00"):
        with pytest.raises(OutputError, match=r"config.pbtxt is not a Triton model configuration"):
            from_pbtxt(text, "config.pbtxt")


def test_a_new_version_enters_beside_the_old_one_and_leaves_its_files_as_they_are(
    verified: VerifiedBundle, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    first = export(verified, repository)
    before = tree(first.model / "1")
    times = {name: (first.model / name).stat().st_mtime_ns for name in ("config.pbtxt", "labels.txt")}
    second = export(retrained(verified, tmp_path / "second"), repository)
    assert (first.version, second.version, second.up_to_date) == (1, 2, False)
    assert tree(first.model / "1") == before
    assert (first.model / "2" / "model.onnx").read_bytes() == before["model.onnx"] + LATER
    # A polling Triton loads a model again when the time of its configuration changes.
    assert {name: (first.model / name).stat().st_mtime_ns for name in times} == times


def test_exporting_the_same_model_again_adds_no_version(verified: VerifiedBundle, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    export(verified, repository, version=7)
    before = tree(repository)
    again = export(verified, repository)
    assert (again.version, again.up_to_date) == (7, True)
    assert tree(repository) == before
    more = export(verified, repository, instances=2)
    assert more.up_to_date
    assert config_of(more.model).instance_group[0].count == 2
    assert export(retrained(verified, tmp_path / "second"), repository).version == 8


def test_a_version_that_holds_another_model_is_never_replaced(verified: VerifiedBundle, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    export(verified, repository, version=3)
    before = tree(repository)
    with pytest.raises(OutputError, match="already has a version 3 with a different model") as caught:
        export(retrained(verified, tmp_path / "second"), repository, version=3)
    assert caught.value.remedy == "Omit --version to write version 4."
    assert tree(repository) == before


def _rename_class(data: dict[str, Any]) -> None:
    data["student"]["classes"][3] = "drei"


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (_rename_class, "classes"),
        (lambda d: d["student"]["preprocessing"].update(mean=[0.1, 0.2, 0.3]), "preprocessing"),
    ],
)
def test_versions_that_mean_different_things_by_their_tensors_do_not_share_a_model(
    edit: Callable[[dict[str, Any]], object], word: str, verified: VerifiedBundle, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    export(verified, repository)
    before = tree(repository)

    def change(data: dict[str, Any]) -> None:
        edit(data)
        change_model(tmp_path / "other")

    with pytest.raises(OutputError, match=f"Version 1 of mobilenetv2 and this bundle differ in {word};"):
        export(resealed(verified, tmp_path / "other", change), repository)
    assert tree(repository) == before


@pytest.mark.parametrize("foreign", ["file", "folder", "bundle", "model of others", "half ours", "is a file", "link"])
def test_files_of_others_are_refused_and_kept(foreign: str, verified: VerifiedBundle, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    repository.mkdir()
    if foreign == "file":
        (repository / "thesis.tex").write_text("unsaved")
    elif foreign == "folder":
        (repository / "photos").mkdir()
        (repository / "photos" / "a.jpg").write_bytes(b"x")
    elif foreign == "bundle":
        shutil.copytree(verified.folder, repository, dirs_exist_ok=True)
    elif foreign == "model of others":
        (repository / "mobilenetv2" / "1").mkdir(parents=True)
        (repository / "mobilenetv2" / "1" / "model.onnx").write_bytes(b"theirs")
    elif foreign == "half ours":
        export(verified, repository)
        (repository / "mobilenetv2" / "2").mkdir()
    elif foreign == "is a file":
        repository.rmdir()
        repository.write_text("x")
    else:
        (repository / "mobilenetv2").symlink_to(export(verified, tmp_path / "elsewhere").model)
    before = tree(tmp_path)
    with pytest.raises(OutputError):
        export(verified, repository)
    assert tree(tmp_path) == before


def test_a_folder_with_a_leading_zero_is_not_a_version(verified: VerifiedBundle, tmp_path: Path) -> None:
    export(verified, tmp_path / "models")
    model = tmp_path / "models" / "mobilenetv2"
    (model / "1").rename(model / "01")
    with pytest.raises(OutputError, match="exists and was not written by kdexport: it has no version"):
        export(verified, tmp_path / "models")


def test_other_models_in_the_repository_are_kept(verified: VerifiedBundle, tmp_path: Path) -> None:
    theirs = tmp_path / "models" / "bert" / "1"
    theirs.mkdir(parents=True)
    (theirs / "model.onnx").write_bytes(b"theirs")
    export(verified, tmp_path / "models")
    assert tree(theirs) == {"model.onnx": b"theirs"}


def test_only_complete_models_ever_appear_in_the_repository(
    verified: VerifiedBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill during the copy or just before the rename leaves the repository unchanged."""
    repository = tmp_path / "models"
    export(verified, repository)
    before = tree(repository)
    newer = retrained(verified, tmp_path / "second")

    def fail(*_: object) -> None:
        assert sorted(path.name for path in repository.iterdir()) == ["mobilenetv2"]
        assert sorted(path.name for path in (repository / "mobilenetv2").iterdir() if path.is_dir()) == ["1", "warmup"]
        raise KeyboardInterrupt

    for module, name in ((shutil, "copyfile"), (versions, "publish")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(KeyboardInterrupt):
                export(newer, repository)
        assert tree(repository) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "second"]
    # The next process removes the files of one that was killed.
    stale = tmp_path / ".models.kdexport-new" / "mobilenetv2"
    stale.mkdir(parents=True)
    (stale / "config.pbtxt").write_text("half")
    assert export(newer, repository).version == 2
    assert not stale.exists()


def test_a_first_export_that_fails_leaves_no_repository(
    verified: VerifiedBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        export(verified, tmp_path / "models")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_changes_after_verification_is_not_published(verified: VerifiedBundle, tmp_path: Path) -> None:
    bundle = resealed(verified, tmp_path / "bundle", lambda _: None)
    change_model(bundle.folder)
    with pytest.raises(BundleError, match="changed after it was verified"):
        export(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_damaged_bundle_is_not_exported_by_the_command(bundle_copy: Path, here: Command, tmp_path: Path) -> None:
    change_model(bundle_copy)
    done = here("triton", bundle_copy, "--repository", tmp_path / "models")
    assert done.exit_code == VerificationError.exit_code, done.stderr
    assert "onnx-fp32/model.onnx changed" in done.stderr
    assert not (tmp_path / "models").exists()


def test_a_plan_is_written_with_its_tensorrt_rule(plan_bundle: VerifiedBundle, tmp_path: Path) -> None:
    result = export(
        plan_bundle, tmp_path / "models", target="trt-fp16", tensorrt_version=f"{BUILT_WITH}-1+cuda13.0", instances=2
    )
    config = config_of(result.model)
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert config.default_model_filename == "model.plan"
    assert config.max_batch_size == plan_bundle.manifest.data["export"]["max_batch"]
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert config.parameters["tensorrt_version"].string_value == BUILT_WITH
    assert "exactly the TensorRT version" in config.parameters["tensorrt_version_rule"].string_value
    original = (plan_bundle.folder / "targets" / "trt-fp16" / "model.plan").read_bytes()
    assert (result.model / "1" / "model.plan").read_bytes() == original


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "was built with TensorRT 10.13.2.6: a plan loads only"),
        ("10.13.2", "but Triton has 10.13.2:"),
        ("11.0.0.1", "but Triton has 11.0.0.1:"),
    ],
)
def test_a_plan_for_another_tensorrt_is_refused(
    given: str | None, words: str, plan_bundle: VerifiedBundle, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        export(plan_bundle, tmp_path / "models", target="trt-fp16", tensorrt_version=given)


def test_an_onnx_version_and_a_plan_do_not_share_a_model(
    verified: VerifiedBundle, plan_bundle: VerifiedBundle, tmp_path: Path
) -> None:
    export(verified, tmp_path / "models")
    with pytest.raises(OutputError, match="differ in backend, tensorrt;"):
        export(plan_bundle, tmp_path / "models", target="trt-fp16", tensorrt_version=BUILT_WITH)


def test_an_engine_that_never_ran_is_refused(plan_bundle: VerifiedBundle, tmp_path: Path) -> None:
    entry = {**plan_bundle.manifest.targets["trt-fp16"], "status": "built, not executed"}
    manifest = dataclasses.replace(plan_bundle.manifest, targets={"trt-fp16": entry})
    request = TritonRequest(repository=tmp_path, name="x", target="trt-fp16", tensorrt_version=BUILT_WITH)
    with pytest.raises(BundleError, match="was built but never run, so its logits were not verified"):
        plan_export(manifest, request)


def _labelled(manifest: Manifest, label: str) -> Manifest:
    return dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, classes=("a", label)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "onnx-fp16"}, "The bundle has no target 'onnx-fp16'"),
        ({"target": "trt-rtx-fp16"}, "TensorRT-RTX plan"),
        ({"name": "../escape"}, "is not a valid model name: 1 to 128 letters, digits, dots, dashes and underscores"),
        ({"name": ".hidden"}, "is not a valid model name: 1 to 128 letters, digits, dots, dashes and underscores"),
        ({"name": "a\nb"}, "is not a valid model name: 1 to 128 letters, digits, dots, dashes and underscores"),
        ({"max_batch": 65}, "--max-batch must be from 1 to 64, the batches with which the bundle was verified; got 65"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_anything_is_written(
    options: dict[str, Any], words: str, verified: VerifiedBundle, tmp_path: Path
) -> None:
    with pytest.raises(KdexportError, match=words) as caught:
        export(verified, tmp_path / "models", **options)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("label", ["two\nlines", "line\x85separator", "end\n", "\r"])
def test_a_class_name_that_would_shift_every_later_label_is_refused(
    label: str, verified: VerifiedBundle, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="has a line break; Triton's label file has one name per line"):
        plan_export(_labelled(verified.manifest, label), TritonRequest(repository=tmp_path / "models", name="x"))


def test_a_repository_that_is_a_mount_point_is_refused_with_a_remedy(
    verified: VerifiedBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, real = tmp_path / "models", Path.stat

    def stat(self: Path, **options: Any) -> os.stat_result:
        found = real(self, **options)
        return os.stat_result((*found[:2], found.st_dev + 1, *found[3:])) if self.name == "models" else found

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(StorageError, match="is a mount point, so files cannot be renamed into it") as caught:
        export(verified, repository)
    assert str(repository / "models") in caught.value.remedy


def test_without_tritons_messages_the_remedy_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tritonclient.grpc", None)
    with pytest.raises(BackendUnavailableError) as caught:
        pbtxt.import_messages()
    assert caught.value.remedy == "Run pip install 'kdexport[triton]'."
