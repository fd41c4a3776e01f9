"""The base of all teachers, and the loading of their weights."""

from pathlib import Path
from typing import ClassVar

from kdexport.errors import CheckpointError
from kdexport.origins.weights import load_weights, read_weights
from kdexport.students import Classifier


class Teacher(Classifier):
    """A classifier that students learn from; its pooling reads the feature of its last tap.

    A teacher that cannot be traced symbolically runs as it is, without its batch norms folded.
    """

    traceable: ClassVar[bool] = True


def outputs_in_file(teacher: Teacher, path: Path) -> int | None:
    """The number of classes of the classifier in a file of weights; None if the file has no such layer."""
    name = f"{teacher.classifier_path}.weight"
    found = [tensor for key, tensor in read_weights(path).tensors.items() if key == name or key.endswith(f".{name}")]
    return len(found[0]) if len(found) == 1 and found[0].ndim == 2 else None


def load_teacher_weights(teacher: Teacher, path: Path) -> tuple[str, ...]:
    """Load the file of weights ``path`` into ``teacher``; returns what was unwrapped, renamed, cast and not used.

    Raises ``CheckpointError`` if the file is missing, is not one of weights, or does not fit to the last tensor:
    ``kdexport.origins.weights`` has the rules.
    """
    if not path.exists():
        raise CheckpointError(
            f"There is no teacher checkpoint {path}.",
            remedy="Pass --teacher-checkpoint FILE, or remove teacher.checkpoint to train the teacher first.",
        )
    weights = read_weights(path)
    return (*weights.notes, *load_weights(teacher, weights, str(path)))
