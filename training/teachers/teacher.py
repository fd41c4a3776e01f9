"""What every teacher tells about itself, and how its weights are read."""

from pathlib import Path

import torch
from torch import Tensor

from kdexport.checkpoint import load_strictly, load_tensors
from kdexport.errors import CheckpointError
from kdexport.students import Classifier


class Teacher(Classifier):
    """A classifier that is distilled from; its last tap is what its pooling reads."""


def load_teacher_weights(teacher: Teacher, path: Path) -> None:
    """Load ``path`` (.safetensors, or .pt holding tensors only) into ``teacher``; raises ``CheckpointError``."""
    if not path.is_file():
        raise CheckpointError(
            f"There is no teacher checkpoint {path}.",
            remedy="Pass --teacher-checkpoint FILE, or remove `checkpoint` under [teacher]: then it is trained first.",
        )
    tensors = load_tensors(path) if path.suffix == ".safetensors" else _load_pickled_tensors(path)
    load_strictly(teacher, tensors, str(path))


def _load_pickled_tensors(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    # A truncated or foreign file fails in the zip reader, the unpickler or torch's own allow-list.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{path} is truncated or holds more than tensors: {reason}",
            remedy="Pass a state_dict saved by torch.save or a .safetensors file; code in a pickle is never run.",
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} is not a state_dict.", remedy="Save model.state_dict() and pass that file.")
    return dict(loaded)
