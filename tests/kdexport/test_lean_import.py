import subprocess
import sys

import pytest

from kdexport import reparam

HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx", "sklearn", "training")
MODULES = [
    "", ".errors", ".registry", ".config", ".targets", ".data.datasets", ".data.preprocessing", ".checkpoint",
    ".core.digests", ".cli", ".bundle.manifest", ".serving.server", ".timing.session", ".pipeline",
]  # fmt: skip


def imported_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", [f"kdexport{name}" for name in MODULES])
def test_a_module_imports_no_heavy_library(module: str) -> None:
    assert not imported_by(f"import {module}") & set(HEAVY)


def test_the_check_would_notice_torch() -> None:
    assert "torch" in imported_by("import kdexport.reparam.algebra")


def test_torchvision_waits_for_a_network_that_needs_it() -> None:
    """It takes as long to import as torch, and so would every command."""
    assert "torchvision" not in imported_by("import kdexport.students, kdexport.pipeline, training.teachers")
    large = "from kdexport.students import STUDENTS; STUDENTS.build('resnet18', num_classes=2, image_size=224)"
    assert "torchvision" in imported_by(large)


@pytest.mark.parametrize("name", sorted(reparam.__all__))
def test_every_public_name_that_waits_for_its_first_use_is_there(name: str) -> None:
    assert getattr(reparam, name).__name__ == name
