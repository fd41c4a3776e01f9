"""Verified bundles of students with random weights, because the speed of a graph does not depend on training."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdexport.build import stages
from kdexport.build.package import Parts, package
from kdexport.bundle.manifest import MANIFEST
from kdexport.checkpoint import StudentSpec, open_checkpoint, save_checkpoint
from kdexport.config import BuildConfig
from kdexport.core.files import replace_folder
from kdexport.data.datasets import ImageSet
from kdexport.data.preprocessing import Preprocessing
from kdexport.students import STUDENTS
from kdexport.targets import parse_targets
from kdexport.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Model:
    """A student by its architecture, image side in pixels, short side before the crop, and classes."""

    name: str
    student: str
    image_size: int
    resize: int
    classes: int


MODELS = {
    "mobilenetv2-224": Model("mobilenetv2-224", "mobilenetv2", 224, 256, 1000),
    "cifar-student": Model("cifar-student", "mobilenetv2", 32, 32, 100),
    # The student of `kdexport quickstart`: scikit-learn's digits.
    "digits-student": Model("digits-student", "mobilenetv2", 32, 32, 10),
}


def random_bundle(model: Model, out: Path) -> Path:
    """The bundle of ``model`` at ``out``; built and verified by the first call."""
    if (out / MANIFEST).is_file():
        return out
    torch.manual_seed(7)
    student = STUDENTS.build(model.student, num_classes=model.classes, image_size=model.image_size)
    _set_batch_norm_statistics(student, model.image_size)
    spec = StudentSpec(
        student=model.student,
        classes=tuple(f"class {index}" for index in range(model.classes)),
        preprocessing=Preprocessing(
            image_size=model.image_size, resize=model.resize, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        ),
        branches=None,
        provenance={"weights": "random, for measuring speed"},
    )
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        save_checkpoint(root / "checkpoint", student, spec)
        (root / "bundle").mkdir()
        package(root / "bundle", _parts(root, model), lambda _: None)
        replace_folder(root / "bundle", out)
    return out


def _set_batch_norm_statistics(student: torch.nn.Module, image_size: int) -> None:
    """Give batch norms the statistics of real activations, so that logits stay in a normal range."""
    student.train()
    with torch.no_grad():
        for _ in range(8):
            student(torch.randn(8, 3, image_size, image_size))
    student.eval()


def _parts(root: Path, model: Model) -> Parts:
    config = BuildConfig.model_validate(
        {
            "student": model.student,
            "recipe": "random",
            "targets": ["onnx-fp32"],
            "verify": {"images": 16, "golden": 8},
            "latency": {"sessions": 3, "pairs": 10, "max_slowdown": 0.9},
        }
    )
    workspace = Workspace(root / "workspace")
    trained = open_checkpoint(root / "checkpoint")
    fused = stages.fuse(trained)
    exported = stages.export(trained, fused, opset=config.export.opset).result(workspace)
    rng = np.random.default_rng(3)
    low = rng.integers(0, 256, (16, 12, 12, 3), np.uint8)
    pixels = low.repeat(model.resize // 12 + 1, axis=1).repeat(model.resize // 12 + 1, axis=2)
    return Parts(
        config=config,
        trained=trained,
        fused=fused.result(workspace),
        model=exported,
        casts=dict.fromkeys(parse_targets(["onnx-fp32"]), exported),
        engines={},
        validation=ImageSet(
            classes=trained.spec.classes, labels=np.arange(16, dtype=np.int64) % model.classes, pixels=pixels, files=()
        ),
        build_key="0" * 64,
    )
