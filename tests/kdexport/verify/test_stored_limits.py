from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdexport.bundle.manifest import read_golden, read_manifest
from kdexport.verify.stored_limits import check_stored_limits
from tests.conftest import Built


def faults(bundle: Path) -> list[str]:
    manifest = read_manifest(bundle)
    checks = check_stored_limits(bundle, manifest, read_golden(bundle, manifest))
    return [check.name for check in checks if not check.holds]


def test_the_limits_of_a_bundle_are_those_of_its_files(built: Built) -> None:
    manifest = read_manifest(built.bundle)
    checks = check_stored_limits(built.bundle, manifest, read_golden(built.bundle, manifest))
    assert {check.name for check in checks} >= {
        "stored unit_error", "stored allowed_error", "stored allowed_distance.onnx-fp32",
    }  # fmt: skip
    assert all(check.holds and 0.2 < check.measured < 2 for check in checks)


@pytest.mark.parametrize("name", ["unit_error", "allowed_error", "allowed_distance.onnx-fp32"])
@pytest.mark.parametrize("factor", [10.0, float("inf"), float("nan")])
def test_a_limit_that_was_loosened_is_named(name: str, factor: float, bundle_copy: Path) -> None:
    path = bundle_copy / "golden" / "logits.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] * factor
    save_file(tensors, path)
    assert faults(bundle_copy) == [f"stored {name}"]


def test_a_bundle_without_stored_limits_has_none_to_check(bundle_copy: Path) -> None:
    path = bundle_copy / "golden" / "logits.safetensors"
    save_file({name: value for name, value in load_file(path).items() if value.numel() > 1}, path)
    assert faults(bundle_copy) == []
    save_file({**load_file(path), "unit_error": torch.tensor(1.0, dtype=torch.float64)}, path)
    assert faults(bundle_copy) == ["stored unit_error"]


def test_a_limit_of_a_low_precision_is_measured_on_its_file(bundle_copy: Path) -> None:
    path = bundle_copy / "golden" / "logits.safetensors"
    for limit, found in ((1e-4, []), (50.0, ["stored allowed_error.trt-rtx-fp16"])):
        save_file({**load_file(path), "allowed_error.trt-rtx-fp16": torch.tensor(limit, dtype=torch.float64)}, path)
        assert faults(bundle_copy) == found
