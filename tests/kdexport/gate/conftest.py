from pathlib import Path

import pytest

from kdexport.gate.arms import artifact, open_bundle
from tests.conftest import Built, made_once


@pytest.fixture(scope="session")
def twin(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scratch folder of a gate whose unfused student was exported: that takes longer than most tests."""
    return made_once(
        tmp_path_factory, "twin", lambda folder: artifact(open_bundle(built.bundle), "onnx-fp32", "unfused", folder)
    )
