"""Bundles and targets as the arms of a gate: which are opened, which may be compared, and which run here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdexport.bundle.manifest import MODEL
from kdexport.errors import BackendUnavailableError, BundleError, ConfigError, MismatchError, UnknownNameError
from kdexport.gate.accuracy import accuracy_gates
from kdexport.gate.arms import artifact, choose_target, open_bundle, require_batches, require_comparable
from kdexport.timing.clocks import require_timeable
from kdexport.timing.session import Arm, Request, pinned_cpus, run_session
from tests.conftest import Built
from tests.kdexport.gate.edited_bundles import rewritten


def test_files_that_are_not_those_of_the_manifest_are_refused(bundle_copy: Path) -> None:
    open_bundle(bundle_copy)
    with (bundle_copy / MODEL).open("ab") as stream:
        stream.write(b"\0")
    (bundle_copy / "report.md").unlink()
    with pytest.raises(
        BundleError, match=r"2 files of .* do not match its manifest: model.onnx changed, report.md mis"
    ):
        open_bundle(bundle_copy)


def test_a_bundle_whose_checks_failed_is_refused(bundle_copy: Path) -> None:
    rewritten(bundle_copy, lambda data: data["parity"][3].update(holds=False))
    with pytest.raises(BundleError, match=r"is not verified: \d+ of \d+ checks passed \(all of one or more required\)"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data["student"].update(student="resnet18"), "different students: mobilenetv2 in .*, resnet18 in"),
        (lambda data: data["student"]["classes"].pop(), "different numbers of classes: 10 in .*, 9 in"),
        (lambda data: data["student"]["classes"].reverse(), "class 0 is '0' in .* and '9' in"),
        (lambda data: data["student"]["preprocessing"].update(image_size=24), "different image sizes"),
        (
            lambda data: data["student"]["preprocessing"].update(interpolation="hamming"),
            "different preprocessing: interpolation is bilinear in .* and hamming in",
        ),
        (
            lambda data: data["student"]["preprocessing"].update(resize=40, mean=[0.25, 0.5, 0.75]),
            r"different preprocessing: resize is \d+ in .* and 40 in .*; mean is .* and \(0.25, 0.5, 0.75\) in",
        ),
    ],
)
def test_bundles_of_different_students_are_not_compared(
    change: Callable[[dict[str, Any]], None], words: str, built: Built, bundle_copy: Path
) -> None:
    other = open_bundle(rewritten(bundle_copy, change))
    with pytest.raises(MismatchError, match=words):
        require_comparable(open_bundle(built.bundle), other)


def test_targets_and_clocks_that_cannot_run_here_are_named(built: Built) -> None:
    bundle = open_bundle(built.bundle)
    assert choose_target(bundle, None) == "onnx-fp32"
    with pytest.raises(UnknownNameError, match="has no target 'trt-fp16'"):
        choose_target(bundle, "trt-fp16")
    with pytest.raises(UnknownNameError, match="no target named 'onnx-fp61'"):
        choose_target(bundle, "onnx-fp61")
    for target, clock in (("onnx-fp32", "gpu"), (choose_target(bundle, "trt-rtx-fp16"), "host")):
        with pytest.raises(BackendUnavailableError) as caught:
            require_timeable(target, clock)
        assert caught.value.exit_code == 4
    require_timeable("onnx-fp32", "serve")
    require_batches(bundle, [1, 64])
    with pytest.raises(ConfigError, match=r"was exported for batch sizes 1 to 64; got 65\."):
        require_batches(bundle, [1, 65])


def test_the_unfused_twin_is_served_beside_the_fused_student(
    built: Built, twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock ``serve`` through two real models in one server, and both arms' labels on the golden images."""
    bundle = open_bundle(built.bundle)
    fused, unfused = (artifact(bundle, "onnx-fp32", variant, twin) for variant in ("fused", "unfused"))
    assert fused.sha256 != unfused.sha256
    assert fused.sha256 == bundle.manifest.files["targets/onnx-fp32/model.onnx"]
    session = run_session(
        Request(
            reference=Arm(path=unfused.path("serve")), candidate=Arm(path=fused.path("serve")), clock="serve",
            image_size=32, batch=2, threads=1, cpus=pinned_cpus(1), pairs=5, seed=1,
        )
    )  # fmt: skip
    assert len(session.pairs_ms) == 5
    # A request through HTTP takes longer than a microsecond and shorter than a second.
    assert all(1e-3 < value < 1e3 for pair in session.pairs_ms for value in pair)
    flips, drop = accuracy_gates([(unfused, bundle), (fused, bundle)], (0.5, 0.5), None, 1)
    assert (flips.images, flips.source, drop.estimate.value) == (360, "stored outputs", 0.0)
    monkeypatch.setattr("kdexport.gate.accuracy.stored_outputs", lambda *_: None)
    flips, drop = accuracy_gates([(unfused, bundle), (fused, bundle)], (0.5, 0.5), None, 1)
    assert (flips.images, flips.estimate.value, drop.estimate.value) == (9, 0.0, 0.0)


def test_a_target_that_would_run_in_another_precision_is_refused(two_targets: Path, tmp_path: Path) -> None:
    for target, clock, words in (
        ("onnx-fp16", "host", "computes a float16 graph in float32"),
        ("onnx-bf16", "host", "no bfloat16 convolution"),
        ("openvino-fp32", "serve", "runs only onnx-fp32 or onnx-int8 on a CPU"),
    ):
        with pytest.raises(BackendUnavailableError, match=words) as caught:
            require_timeable(target, clock)
        assert caught.value.exit_code == 4
    bundle = open_bundle(two_targets)
    assert choose_target(bundle, "openvino-fp32") == "openvino-fp32"
    (two_targets / "targets" / "openvino-fp32" / MODEL).unlink()
    with pytest.raises(BundleError, match=r"contains no model.onnx for openvino-fp32"):
        artifact(bundle, "openvino-fp32", "fused", tmp_path)
    with pytest.raises(ConfigError, match="cannot be compared with the unfused student"):
        artifact(bundle, "trt-fp16", "unfused", tmp_path)
