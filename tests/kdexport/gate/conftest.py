import shutil
from pathlib import Path
from typing import Any

import pytest

from kdexport.gate.arms import artifact, open_bundle
from tests.conftest import Built, made_once
from tests.kdexport.gate.edited_bundles import edited


@pytest.fixture(scope="session")
def twin(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scratch folder of a gate whose unfused student was exported: that takes longer than most tests."""
    return made_once(
        tmp_path_factory, "twin", lambda folder: artifact(open_bundle(built.bundle), "onnx-fp32", "unfused", folder)
    )


@pytest.fixture
def two_targets(bundle_copy: Path) -> Path:
    """A bundle with openvino-fp32 beside onnx-fp32."""
    shutil.copytree(bundle_copy / "targets" / "onnx-fp32", bundle_copy / "targets" / "openvino-fp32")

    def add(data: dict[str, Any]) -> None:
        # Its own golden logits were not computed.
        entry = {key: value for key, value in data["targets"]["onnx-fp32"].items() if key != "golden"}
        data["targets"]["openvino-fp32"] = entry

    return edited(bundle_copy, add)
