"""The base of all teachers, and the loading of their weights."""

import argparse
import json
import shlex
from pathlib import Path

import torch
from torch import Tensor

from kdexport.checkpoint import load_strictly, load_tensors
from kdexport.errors import CheckpointError
from kdexport.students import Classifier

_WRAPPED = "module."


class Teacher(Classifier):
    """A classifier that students learn from; its pooling reads the feature of its last tap."""


def load_teacher_weights(teacher: Teacher, path: Path) -> None:
    """Load ``path`` (.safetensors, or .pt with tensors only) into ``teacher``; raises ``CheckpointError``.

    A .pt file has a state_dict, or a dictionary with one under "model" as public checkpoints do. The prefix "module.",
    which DataParallel adds, is removed if every name has it. All tensors must match.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no teacher checkpoint {path}.",
            remedy="Pass --teacher-checkpoint FILE, or remove teacher.checkpoint to train the teacher first.",
        )
    tensors = load_tensors(path) if path.suffix == ".safetensors" else _load_pickled_tensors(path)
    if tensors and all(name.startswith(_WRAPPED) for name in tensors):
        tensors = {name.removeprefix(_WRAPPED): tensor for name, tensor in tensors.items()}
    load_strictly(teacher, tensors, str(path))


def _load_pickled_tensors(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    # A truncated or foreign file fails in the zip reader, the unpickler or the allow-list of torch.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{path} is truncated or contains more than tensors: {reason}", remedy=_conversion(path)
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not all(_is_tensor_entry(*entry) for entry in loaded.items()):
        raise CheckpointError(
            f"{path} does not contain a state_dict.",
            remedy="Save model.state_dict() with torch.save and pass that file.",
        )
    return dict(loaded)


def _is_tensor_entry(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _conversion(path: Path) -> str:
    """The remedy for a pickle that torch refused to read as tensors."""
    # Training scripts often store their argparse options; a Namespace has only values and runs no code.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001  # the caller reports what the file holds
        loaded = None
    if not isinstance(loaded, dict) or not isinstance(loaded.get("model"), dict):
        return "Pass a state_dict saved by torch.save, or a .safetensors file; code in a pickle is never run."
    source, target = (json.dumps(str(name), ensure_ascii=False) for name in (path, path.with_suffix(".weights.pt")))
    code = (
        "import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace]); "
        f'torch.save(torch.load({source}, map_location="cpu", weights_only=True)["model"], {target})'
    )
    return (
        "The file also contains the options of its training run (an argparse.Namespace). Save only the weights, which "
        f"runs no code of the file: {shlex.join(['python', '-c', code])}"
    )
