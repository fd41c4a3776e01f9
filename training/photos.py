"""A recipe for a folder of images, chosen from the number and the size of the images and from the student.

The reasons for each choice are in docs/training.md, section "Your own photos".
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdexport.data.datasets import open_dataset, spread
from kdexport.students.student import IMAGENET_MIN_SIZE
from training.recipe import DataSettings

#: The recipe that holds what does not depend on the images.
BASE = "parts/photos"

_SIZES = (32, 64, 128, 224)
_MEASURED_IMAGES = 100
#: The largest of these batches with which an epoch has enough steps; the statistics of batch norms need the smallest.
_BATCHES, _STEPS = (64, 32, 16, 8), 8
#: Learning rate of a batch of 64; it is scaled with the batch.
_LEARNING_RATE = 0.05
#: A run reads about this many images, in a number of epochs within the limits.
_IMAGES, _FEWEST, _MOST = 60_000, 30, 100
#: The level of ``training.plausibility``: fewer test images can never show that a teacher is better than chance.
_CHANCE = 0.01
_RESNET_TAPS = {f"stage{index}": f"layer{index}" for index in range(1, 5)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFacts:
    """What the choices depend on: numbers of images and classes, and the median of the shorter sides in pixels."""

    training: int
    test: int
    classes: int
    side: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """The tables of a recipe over ``BASE``, and one line of words on what was chosen."""

    tables: dict[str, dict[str, Any]]
    summary: str


def measure(settings: DataSettings) -> ImageFacts:
    """Count the images and read the sizes of up to 100 of them; raises ``DataError`` for a folder without classes."""
    train, test = open_dataset(settings.spec(), "train"), open_dataset(settings.spec(), "test")
    found = [_shorter_side(train.files[index]) for index in spread(len(train), _MEASURED_IMAGES)]
    sides = [side for side in found if side is not None]
    side = int(statistics.median(sides)) if sides else 0
    return ImageFacts(training=len(train), test=len(test), classes=len(train.classes), side=side)


def _shorter_side(path: Path) -> int | None:
    """The shorter side of an image in pixels; None for a damaged file, which is named when the images are checked."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return min(image.size)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def propose(facts: ImageFacts, student: str, image_size: int | None) -> Proposal:
    """The recipe for images with ``facts``; ``image_size`` None takes the largest usual size that they have."""
    size = image_size or max([each for each in _SIZES if each <= facts.side], default=_SIZES[0])
    batch = min(_batch(facts.training), facts.training)
    epochs = min(max(round(_IMAGES / facts.training), _FEWEST), _MOST)
    rate = _LEARNING_RATE * batch / _BATCHES[0]
    is_reference = ":" in student
    teacher = _teacher(student, size)
    # No test split of so few images can pass the check for a teacher at chance level.
    small = facts.classes ** float(-facts.test) > _CHANCE
    plausibility = {"plausibility": "reported"} if small else {}
    tables: dict[str, dict[str, Any]] = {
        "data": {
            "image_size": size,
            "resize": 0 if size < IMAGENET_MIN_SIZE else round(size * 256 / 224),
            "crop_padding": size // 8,
        },
        "teacher": {**teacher, "epochs": epochs, "learning_rate": rate, **plausibility},
        "student": {"name": student},
        "distiller": _method(epochs, has_taps=not is_reference),
        "train": {
            "epochs": epochs,
            "batch_size": batch,
            "learning_rate": rate,
            "warmup_epochs": round(epochs / 20, 1),
        },
    }
    given = "as given" if image_size else f"the shorter sides have {facts.side}"
    method = "kd, because the places of its branches are not known" if is_reference else "kdiffusion multi with guide"
    summary = (
        f"{student} at {size} pixels ({given}), teacher {teacher['name']} trained first, {method}, "
        f"{epochs} epochs of {facts.training // batch} batches of {batch}"
    )
    return Proposal(tables=tables, summary=summary)


def _batch(training: int) -> int:
    return next((each for each in _BATCHES if training >= each * _STEPS), _BATCHES[-1])


def _teacher(student: str, size: int) -> dict[str, Any]:
    """A teacher that is larger than the student and can be trained without a large GPU."""
    is_resnet18 = student in ("resnet18", "torchvision:resnet18", "timm:resnet18")
    if size < IMAGENET_MIN_SIZE:
        return {"name": "resnet32x4" if is_resnet18 else "resnet8x4"}
    name = "torchvision:resnet50" if is_resnet18 else "torchvision:resnet18"
    return {"name": name, "taps": _RESNET_TAPS}


def _method(epochs: int, *, has_taps: bool) -> dict[str, Any]:
    if not has_taps:
        return {"name": "kd"}
    ramp = round(epochs / 10, 1)
    return {"name": "kdiffusion", "layers": "multi", "target_guide": 1.0, "ramp_epochs": ramp}
