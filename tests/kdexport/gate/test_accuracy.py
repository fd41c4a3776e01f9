"""Flipped answers and lost accuracy, from the outputs that bundles store or from models that are run."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from kdexport.bundle.manifest import TASK
from kdexport.errors import MismatchError, VerificationError
from kdexport.gate.accuracy import accuracy_gates, labelled_images, require_golden_logits, stored_outputs
from kdexport.gate.arms import Artifact, Bundle, artifact, open_bundle
from tests.conftest import Built
from tests.kdexport.gate.edited_bundles import edited


def pair(one: Path, other: Path) -> list[tuple[Artifact, Bundle]]:
    bundles = [open_bundle(folder) for folder in (one, other)]
    return [(artifact(bundle, "onnx-fp32", "fused", one), bundle) for bundle in bundles]


def flipped(bundle: Path, count: int) -> Path:
    """``bundle`` with ``count`` stored answers of its model changed."""
    stored = load_file(bundle / TASK)
    stored["model.onnx:predictions"][:count] = (stored["model.onnx:predictions"][:count] + 1) % 10
    save_file(stored, bundle / TASK)
    return edited(bundle, lambda data: None)


def test_stored_outputs_of_the_same_images_are_used(
    built: Built, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdexport.gate.accuracy.predictions", lambda *_, **__: pytest.fail("a model was run"))
    arms = pair(built.bundle, flipped(bundle_copy, 7))
    for data in (None, "digits"):
        (flips,) = accuracy_gates(arms, (0.5, None), data, 1)
        assert (flips.images, flips.source, flips.estimate.value) == (360, "stored outputs", 7 / 360)


def test_stored_outputs_equal_those_of_the_models(built: Built) -> None:
    arms = pair(built.bundle, built.bundle)
    stored = stored_outputs(arms, None)
    assert stored is not None
    from kdexport.gate.accuracy import labelled_images, predictions

    images = labelled_images(arms[0][1], "digits")
    np.testing.assert_array_equal(stored.candidate, predictions(*arms[1], images, 1))
    np.testing.assert_array_equal(stored.labels, images.images.labels)
    unfused = [(replace(arms[0][0], variant="unfused"), arms[0][1]), arms[1]]
    against = stored_outputs(unfused, None)
    assert against is not None
    np.testing.assert_array_equal(against.reference, load_file(built.bundle / TASK)["predictions"])


@pytest.mark.parametrize(
    "change",
    [
        lambda task: task.update(data_sha256="0" * 64),
        lambda task: task.pop("data_sha256"),
        lambda task: task["files"].pop("model.onnx"),
    ],
)
def test_models_are_run_if_one_bundle_has_no_stored_outputs(
    change: Callable[[dict[str, Any]], None], built: Built, bundle_copy: Path
) -> None:
    arms = pair(built.bundle, edited(bundle_copy, lambda data: change(data["task"])))
    assert stored_outputs(arms, None) is None
    (flips,) = accuracy_gates(arms, (0.9, None), None, 1)
    assert (flips.images, flips.source, flips.estimate.value) == (9, "golden images", 0)


def test_models_are_run_on_images_whose_outputs_are_not_stored(built: Built, bundle_copy: Path) -> None:
    arms = pair(built.bundle, bundle_copy)
    assert stored_outputs(arms, "0" * 64) is None
    # A part of the split is not the requested split.
    part = edited(bundle_copy, lambda data: data["task"].update(data_images=361))
    fingerprint = open_bundle(part).manifest.data["task"]["data_sha256"]
    assert stored_outputs(pair(part, part), fingerprint) is None
    assert stored_outputs(pair(part, part), None) is not None


def test_outputs_of_a_cpu_are_not_used_for_a_gpu(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kdexport.gate.accuracy.predictions", lambda *_, on_gpu: np.zeros(9, np.int64) if on_gpu else None
    )
    (flips,) = accuracy_gates(pair(built.bundle, built.bundle), (0.9, None), None, 1, on_gpu=True)
    assert (flips.source, flips.images) == ("golden images", 9)


def test_validation_images_must_be_of_the_same_classes(built: Built, tmp_path: Path) -> None:
    bundle = open_bundle(built.bundle)
    assert labelled_images(bundle, None).source == "golden images"
    assert len(labelled_images(bundle, "digits").images) == 360
    for name in "01":
        (tmp_path / "set" / "val" / name).mkdir(parents=True)
        shutil.copy(built.bundle / bundle.manifest.golden[0], tmp_path / "set" / "val" / name / "a.png")
    with pytest.raises(MismatchError, match=r"classes of .* \(2\) and of .* \(10\) differ"):
        labelled_images(bundle, str(tmp_path / "set"))


def test_a_graph_that_opens_but_cannot_run_is_named(built: Built, tmp_path: Path) -> None:
    bundle = open_bundle(built.bundle)
    size = bundle.image_size
    target = numpy_helper.from_array(np.asarray([7, 7], np.int64), "shape")
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["input", "shape"], ["logits"])],
        "damaged",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [target],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    damaged = replace(artifact(bundle, "onnx-fp32", "fused", tmp_path), model=path, label="the damaged one")
    with pytest.raises(VerificationError, match=r"the damaged one cannot be run: .*Reshape") as caught:
        require_golden_logits(damaged, bundle, 1)
    assert "Nothing was timed" in caught.value.remedy
