"""Every change to a bundle is detected, and a malformed manifest is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from kdexport.bundle.manifest import hash_files, read_golden, read_manifest
from kdexport.errors import BundleError
from kdexport.reparam import fold_student
from kdexport.reparam.algebra import fold_batch_norm
from kdexport.verify.student_checks import check_algebra
from kdexport.verify.verdict import VerifiedBundle, replay
from tests.conftest import Built, Command

ONNX_FILES = ("model.onnx", "targets/onnx-fp32/model.onnx", "targets/trt-rtx-fp16/model.onnx")


def failures(folder: Path) -> str:
    verdict = replay(folder, read_manifest(folder), lambda _: None)
    return "\n".join(f"{check.rung} {check.subject} {check.name} {check.detail}" for check in verdict.failures)


def change(folder: Path, edit: Callable[[dict[str, Any]], object], *, rehash: bool = False) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    if rehash:
        data["files"] = hash_files(folder)
    path.write_text(json.dumps(data))


def scale_one_weight(path: Path, name: str) -> None:
    model = onnx.load(path)
    item = next(entry for entry in model.graph.initializer if entry.name == name)
    values = numpy_helper.to_array(item).copy()
    index = int(np.abs(values).argmax())
    values.flat[index] *= values.dtype.type(1.01)
    item.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, path)


def test_the_onnx_file_gives_the_logits_of_the_fused_student_in_plain_onnxruntime(built: Built) -> None:
    manifest = read_manifest(built.bundle)
    images = manifest.spec.preprocessing.normalise(read_golden(built.bundle, manifest))
    session = ort.InferenceSession(str(built.bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"input": images})[0]
    stored = load_file(built.bundle / "golden" / "logits.safetensors")["logits"].numpy()
    assert np.abs(logits - stored).max() < 1e-5 * np.abs(stored).max()


@pytest.mark.parametrize(
    ("file", "name"),
    zip(ONNX_FILES, ["conv1.0.weight", "blocks.4.1.conv.3.weight", "classifier.0.weight"], strict=True),
)
def test_one_weight_changed_by_one_percent_is_found_and_its_layer_named(
    file: str, name: str, bundle_copy: Path
) -> None:
    scale_one_weight(bundle_copy / file, name)
    # Even if the digests are written again to match.
    change(bundle_copy, lambda _: None, rehash=True)
    assert f"audit {file} weights layer {name} (1 of " in failures(bundle_copy)


def test_verify_exits_with_1_and_names_file_and_layer(bundle_copy: Path, here: Command) -> None:
    scale_one_weight(bundle_copy / "model.onnx", "conv2.0.weight")
    done = here("verify", bundle_copy)
    assert done.exit_code == 1
    assert "model.onnx changed" in done.stderr
    assert "layer conv2.0.weight" in done.stderr


def test_weights_that_are_not_the_merged_ones_are_found(bundle_copy: Path) -> None:
    path = bundle_copy / "student.safetensors"
    tensors = load_file(path)
    tensors["conv2.0.bias"][7] *= 1.01
    save_file(tensors, path)
    change(bundle_copy, lambda _: None, rehash=True)
    assert "weights are the folded ones layer conv2.0.bias" in failures(bundle_copy)


def test_rung_a_alone_proves_the_algebra_block_by_block(built: Built, here: Command) -> None:
    done = here("verify", built.bundle, "--rung", "A", "--json")
    assert done.exit_code == 0, done.stderr
    checks = [check for check in done.data["checks"] if check["rung"] == "A"]
    recorded = [block["name"] for block in read_manifest(built.bundle).data["certificate"]["blocks"]]
    assert [check["subject"] for check in checks] == ["student.safetensors", *recorded, "student"]
    assert all(check["measured"] <= check["allowed"] == 1e-9 for check in checks[1:])
    assert not [check for check in done.data["checks"] if check["rung"] in ("B", "C", "run")]


def test_rung_a_names_the_layer_whose_stored_weights_differ(bundle_copy: Path, here: Command) -> None:
    path = bundle_copy / "student.safetensors"
    tensors = load_file(path)
    tensors["blocks.2.1.conv.3.weight"][7] *= 1.001
    save_file(tensors, path)
    change(bundle_copy, lambda _: None, rehash=True)
    done = here("verify", bundle_copy, "--rung", "A")
    assert done.exit_code == 1
    assert "layer blocks.2.1.conv.3.weight" in done.stderr


def test_rung_a_lists_every_block_that_a_wrong_fold_breaks(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fold_student,
        "fold_batch_norm",
        lambda weight, bias, norm: (
            fold_batch_norm(weight, bias, norm) if norm.num_features != 80 else (weight, norm.bias)
        ),
    )
    manifest = read_manifest(built.bundle)
    checks = check_algebra(built.bundle, manifest, read_golden(built.bundle, manifest))
    broken = [f"blocks.5.{i}.conv.6" for i in range(3)]
    assert [check.subject for check in checks if not check.holds] == ["student.safetensors", *broken, "student"]


def test_rung_a_block_by_block_is_held_to_the_policy_of_the_bundle(bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    data = json.loads(path.read_text())
    data["policy"]["A"]["relative_error"] = 1e-30
    path.write_text(json.dumps(data))
    manifest = read_manifest(bundle_copy)
    _, *algebra = check_algebra(bundle_copy, manifest, read_golden(bundle_copy, manifest))
    assert {check.allowed for check in algebra} == {1e-30}
    assert not all(check.holds for check in algebra)


def test_a_replaced_unfused_student_is_found(bundle_copy: Path) -> None:
    path = bundle_copy / "unfused.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("branches.1.1.running_var"))
    tensors[name] *= 1.01
    save_file(tensors, path)
    change(bundle_copy, lambda _: None, rehash=True)
    found = failures(bundle_copy)
    assert "reference logits" in found
    assert "weights are the folded ones" in found


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        ("missing", "golden/logits.safetensors"),
        ("missing", "targets/trt-rtx-fp16/layers.json"),
        ("truncated", "unfused.safetensors"),
        ("truncated", "targets/trt-rtx-fp16/model.plan"),
    ],
)
def test_a_missing_or_truncated_file_is_a_failed_check_and_no_crash(file: str, damage: str, bundle_copy: Path) -> None:
    path = bundle_copy / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert file in failures(bundle_copy)


def test_a_golden_image_with_changed_pixels_is_found(bundle_copy: Path) -> None:
    first, second = (bundle_copy / "golden" / name for name in ("000.png", "004.png"))
    first.write_bytes(second.read_bytes())
    change(bundle_copy, lambda _: None, rehash=True)
    assert "golden images reference logits" in failures(bundle_copy)


def _swap_classes(data: dict[str, Any]) -> None:
    classes = data["student"]["classes"]
    classes[2], classes[5] = classes[5], classes[2]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_swap_classes, "metadata differs from the manifest in classes"),
        (lambda d: d["student"]["preprocessing"].update(mean=[0.3, 0.3, 0.31]), "preprocessing"),
        (lambda d: d["targets"].pop("trt-rtx-fp16"), "bundle targets"),
        (lambda d: d["provenance"].update(teacher_sha256="0" * 64), "provenance"),
    ],
)
def test_a_manifest_that_contradicts_the_files_is_found(
    edit: Callable[[dict[str, Any]], object], words: str, bundle_copy: Path
) -> None:
    change(bundle_copy, edit)
    assert words in failures(bundle_copy)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["export"].update(max_batch=0),
        lambda d: d["export"].update(min_batch="x"),
        lambda d: d.update(golden=[]),
        lambda d: d.update(golden=["../../etc/passwd"]),
        lambda d: d.update(parity=None),
        lambda d: d.update(schema_version=99),
        lambda d: d.pop("student"),
        lambda d: d["targets"].update({"../../x": d["targets"]["onnx-fp32"]}),
        lambda d: d["targets"]["onnx-fp32"].update(precision="int8"),
        lambda d: d["student"]["preprocessing"].update(image_size=1_000_000),
        lambda d: d["student"]["preprocessing"].update(resize=0),
        lambda d: d["student"].update(branches={"placement": "R9", "num_branches": 2}),
    ],
)
def test_a_malformed_manifest_is_refused(edit: Callable[[dict[str, Any]], object], bundle_copy: Path) -> None:
    change(bundle_copy, edit)
    with pytest.raises(BundleError, match="is damaged or was written by another version"):
        read_manifest(bundle_copy)


def test_a_bundle_of_a_backend_that_is_not_here_says_what_to_pass(bundle_copy: Path) -> None:
    change(bundle_copy, lambda d: d["targets"].update({"my-runtime-fp32": d["targets"]["onnx-fp32"]}))
    with pytest.raises(BundleError) as caught:
        read_manifest(bundle_copy)
    assert str(caught.value) == (
        "The bundle was built for the target 'my-runtime-fp32', and there is no backend named 'my-runtime' here.\n"
        "Pass --plugin FILE.py, or install the package that has the backend. Known: coreml, executorch, litert, ncnn, "
        "onnx, openvino, trt, trt-rtx."
    )


def test_only_verification_makes_a_verified_bundle(built: Built) -> None:
    with pytest.raises(TypeError):
        VerifiedBundle(built.bundle, read_manifest(built.bundle), object())


def test_an_unfused_file_in_bfloat16_is_refused(bundle_copy: Path) -> None:
    path = bundle_copy / "unfused.safetensors"
    save_file({name: t.bfloat16() if t.dtype == torch.float32 else t for name, t in load_file(path).items()}, path)
    assert "bfloat16" in failures(bundle_copy)
