"""Bundles of students with random weights, made by the stages and packaging of a real build, without training."""

import io
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdexport.backends.file_interface import PLAIN_INTERFACE, FileInterface
from kdexport.build import stages
from kdexport.build.package import Parts, package
from kdexport.checkpoint import StudentSpec, open_checkpoint, save_checkpoint
from kdexport.config import BuildConfig
from kdexport.core.digests import digest
from kdexport.data.datasets import ImageSet
from kdexport.data.preprocessing import Preprocessing
from kdexport.students import STUDENTS
from kdexport.targets import parse_target
from kdexport.workspace import Workspace
from tests.kdexport.hostile_values import randomize

CONFIG = {
    "student": "mobilenetv2",
    "recipe": "digits",
    "export": {"max_batch": 8},
    "verify": {"images": 8, "golden": 8},
    "latency": {"sessions": 3, "pairs": 10, "max_slowdown": 0.9},
}
#: With a colon, quotes and a non-ASCII letter, because labels are part of "score:index:label" and of JSON.
CLASSES = ("cat", "dog: big", 'a "bird"', "\u00e9l\u00e9phant", "fish", "frog", "hen")


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Waves and noise: JPEG preserves them, and no symmetry hides a flip or a swap of channels."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + rng.uniform(0, 6)) for _ in range(3)]
    noise = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.stack(waves, -1) * 100 + 128 + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_images(folder: Path, count: int, width: int, height: int) -> tuple[Path, ...]:
    """JPEG, PNG and WebP files in turn, of slightly different sizes."""
    folder.mkdir(parents=True)
    paths = []
    for index in range(count):
        kind = ("JPEG", "PNG", "WEBP")[index % 3]
        path = folder / f"{index}.{kind.lower()}"
        path.write_bytes(encoded(photo(width + 3 * index, height + index, index), kind))
        paths.append(path)
    return tuple(paths)


def make_bundle(
    root: Path,
    *,
    image_size: int = 32,
    resize: int = 37,
    classes: tuple[str, ...] = CLASSES,
    seed: int = 5,
    policy: Mapping[str, Any] = MappingProxyType({}),
    interface: FileInterface = PLAIN_INTERFACE,
) -> Path:
    """A verified bundle below ``root``, with random batch norms and a resize that differs from the image size."""
    preprocessing = Preprocessing.for_new_student(
        image_size=image_size, resize=resize, mean=(0.41, 0.47, 0.39), std=(0.21, 0.27, 0.24)
    )
    torch.manual_seed(seed)
    student = STUDENTS.build("mobilenetv2", num_classes=len(classes), image_size=image_size)
    randomize(student, seed=seed)
    spec = StudentSpec(
        student="mobilenetv2", classes=classes, preprocessing=preprocessing, branches=None, provenance={}
    )
    save_checkpoint(root / "checkpoint", student, spec)
    files = make_images(root / "images", 8, image_size * 3, image_size * 2)
    labels = np.arange(8, dtype=np.int64) % len(classes)
    validation = ImageSet(classes=classes, labels=labels, pixels=None, files=files)
    export = {"max_batch": 8, "input": interface.takes, "output": interface.gives}
    config = BuildConfig.model_validate({**CONFIG, "policy": dict(policy), "export": export})
    workspace = Workspace(root / "workspace")
    trained = open_checkpoint(root / "checkpoint")
    fused = stages.fuse(trained)
    exported = stages.export(trained, fused, opset=config.export.opset)
    model = exported.result(workspace)
    parts = Parts(
        config=config,
        trained=trained,
        fused=fused.result(workspace),
        model=model,
        casts={parse_target("onnx-fp32"): stages.with_interface(exported, interface, preprocessing).result(workspace)},
        engines={},
        validation=validation,
        build_key=digest(["test", seed, image_size]),
    )
    bundle = root / "bundle"
    bundle.mkdir()
    package(bundle, parts, lambda _: None)
    return bundle
