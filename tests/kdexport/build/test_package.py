"""Checks of a bundle while it is assembled."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from kdexport.build.package import require_unfused
from kdexport.bundle.manifest import read_manifest
from kdexport.errors import ExportError
from tests.conftest import Built


def test_the_file_that_the_fused_student_is_timed_against_must_compute_the_unfused_one(
    built: Built, tmp_path: Path
) -> None:
    given = next((built.workspace / "export").glob("*/unfused.onnx"))
    manifest = read_manifest(built.bundle)
    require_unfused(given, built.bundle, manifest)
    model = onnx.load(str(given))
    # The last convolution: one epoch leaves the first ones without effect.
    weights = [item for item in model.graph.initializer if len(item.dims) == 4][-1]
    values = numpy_helper.to_array(weights).astype(np.float64)
    values *= 1.05
    weights.CopyFrom(numpy_helper.from_array(values.astype(np.float32), weights.name))
    changed = tmp_path / "unfused.onnx"
    onnx.save(model, str(changed))
    with pytest.raises(
        ExportError, match=r"unfused\.onnx is not the unfused student: .* off by .* allowed\)"
    ) as caught:
        require_unfused(changed, built.bundle, manifest)
    assert "--fresh" in caught.value.remedy
