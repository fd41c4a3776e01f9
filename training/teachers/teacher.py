"""The base of all teachers, and the loading of their weights."""

from pathlib import Path
from typing import ClassVar

from kdexport.errors import CheckpointError
from kdexport.origins.weights import Weights, load_weights, read_weights
from kdexport.students import Classifier


class Teacher(Classifier):
    """A classifier that students learn from; its pooling reads the feature of its last tap.

    A teacher that cannot be traced symbolically runs as it is, without its batch norms folded.
    """

    traceable: ClassVar[bool] = True


def outputs_in_weights(teacher: Teacher, weights: Weights) -> int | None:
    """The number of classes of the classifier in the weights of a file; None if they have no such layer."""
    name = f"{teacher.classifier_path}.weight"
    found = [tensor for key, tensor in weights.tensors.items() if key == name or key.endswith(f".{name}")]
    return len(found[0]) if len(found) == 1 and found[0].ndim == 2 else None


def load_teacher_weights(teacher: Teacher, path: Path) -> tuple[str, ...]:
    """Load the file of weights ``path`` into ``teacher``; returns what was unwrapped, renamed, cast and not used.

    Raises ``CheckpointError`` if the file is missing, is not one of weights, or does not fit to the last tensor:
    ``kdexport.origins.weights`` has the rules.
    """
    weights = read_teacher_weights(path)
    return (*weights.notes, *load_weights(teacher, weights, str(path)))


def read_teacher_weights(path: Path) -> Weights:
    """The tensors in the file ``path``; raises ``CheckpointError`` if it is missing or is not one of weights."""
    if not path.exists():
        raise CheckpointError(
            f"There is no teacher checkpoint {path}.",
            remedy="Pass --teacher-checkpoint FILE, or remove teacher.checkpoint to train the teacher first.",
        )
    return read_weights(path)
