"""What every teacher tells about itself, and how its weights are read."""

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
    """A classifier that is distilled from; its last tap is what its pooling reads."""


def load_teacher_weights(teacher: Teacher, path: Path) -> None:
    """Load ``path`` (.safetensors, or .pt holding tensors only) into ``teacher``; raises ``CheckpointError``.

    A .pt is a state_dict, or a dictionary with one under "model" as the public checkpoints are. Where every name begins
    with "module.", the name that DataParallel gives to a network it wraps, that is taken off. All tensors must fit.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no teacher checkpoint {path}.",
            remedy="Pass --teacher-checkpoint FILE, or remove `checkpoint` under [teacher]: then it is trained first.",
        )
    tensors = load_tensors(path) if path.suffix == ".safetensors" else _load_pickled_tensors(path)
    if tensors and all(name.startswith(_WRAPPED) for name in tensors):
        tensors = {name.removeprefix(_WRAPPED): tensor for name, tensor in tensors.items()}
    load_strictly(teacher, tensors, str(path))


def _load_pickled_tensors(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    # A truncated or foreign file fails in the zip reader, the unpickler or torch's own allow-list.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{path} is truncated or holds more than tensors: {reason}", remedy=_conversion(path)
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not all(_is_tensor_entry(*entry) for entry in loaded.items()):
        raise CheckpointError(f"{path} is not a state_dict.", remedy="Save model.state_dict() and pass that file.")
    return dict(loaded)


def _is_tensor_entry(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _conversion(path: Path) -> str:
    """What to do about a pickle that torch refused to read as tensors."""
    # Options of argparse are what training scripts like to store; a Namespace can hold values only, and runs nothing.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001  # the caller reports what the file holds
        loaded = None
    if not isinstance(loaded, dict) or not isinstance(loaded.get("model"), dict):
        return "Pass a state_dict saved by torch.save or a .safetensors file; code in a pickle is never run."
    source, target = (json.dumps(str(name), ensure_ascii=False) for name in (path, path.with_suffix(".weights.pt")))
    code = (
        "import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace]); "
        f'torch.save(torch.load({source}, map_location="cpu", weights_only=True)["model"], {target})'
    )
    return (
        "It holds the options of its training run (an argparse.Namespace) beside the weights. Save the weights alone, "
        f"which runs no code of the file: {shlex.join(['python', '-c', code])}"
    )
