"""The result of training: a folder with student.json and model.safetensors; nothing is pickled."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdexport.core.digests import sha256_file
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import CheckpointError
from kdexport.registry import nearest
from kdexport.reparam.spec import BranchSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kdexport.students import Student

SCHEMA_VERSION = 1
_SPEC, _WEIGHTS = "student.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentSpec:
    """Everything that is needed to build a student and to prepare its input, except its weights."""

    student: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    branches: BranchSpec | None
    provenance: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Height and width of an input image, in pixels."""
        return self.preprocessing.image_size

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "student": self.student,
            "classes": list(self.classes),
            "preprocessing": self.preprocessing.to_json(),
            "branches": None if self.branches is None else self.branches.to_json(),
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "StudentSpec":
        """Inverse of ``to_json``; raises ``KeyError``, ``TypeError`` or ``ValueError`` for other data."""
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {data['schema_version']!r}, this version reads {SCHEMA_VERSION}")
        known = ("schema_version", "student", "classes", "preprocessing", "branches", "provenance")
        unknown = sorted(data.keys() - set(known))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(known)}")
        branches, classes = data["branches"], data["classes"]
        if not isinstance(classes, list) or not classes:
            raise ValueError("classes is not a list of at least one name")
        return cls(
            student=str(data["student"]),
            classes=tuple(str(name) for name in classes),
            preprocessing=Preprocessing.from_json(data["preprocessing"]),
            branches=None if branches is None else BranchSpec.from_json(branches),
            provenance=dict(data["provenance"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedStudent:
    """A checkpoint on disk whose description was read and whose weights were hashed."""

    weights: Path
    weights_sha256: str
    spec: StudentSpec
    #: sha256 of the source of the plugin that defines the student; empty for a student of this package.
    plugin_sha256: str = ""


def open_checkpoint(directory: Path) -> TrainedStudent:
    """Read student.json and hash the weights; raises ``CheckpointError`` if one is missing or not readable."""
    spec_path, weights = directory / _SPEC, directory / _WEIGHTS
    for path in (spec_path, weights):
        if not path.is_file():
            raise CheckpointError(
                f"{directory} is not a student checkpoint: it has no {path.name}.",
                remedy="Pass a folder written by python -m training train (student.json and model.safetensors).",
            )
    try:
        spec = StudentSpec.from_json(json.loads(spec_path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{spec_path} does not describe a student: {type(error).__name__}: {error}.",
            remedy="Pass a folder written by this version of python -m training train.",
        ) from error
    return TrainedStudent(weights=weights, weights_sha256=sha256_file(weights), spec=spec)


def save_checkpoint(directory: Path, student: "nn.Module", spec: StudentSpec) -> None:
    """Write a checkpoint folder; the write is not atomic, so the caller renames the folder when it is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(directory / _WEIGHTS, student.state_dict())
    (directory / _SPEC).write_text(json.dumps(spec.to_json(), indent=2, sort_keys=True) + "\n")


def save_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, on the CPU and contiguous, with ``metadata`` in the header of the file."""
    from safetensors.torch import save

    # Serialized first and written by Python, so that a full disk raises OSError, not an error of safetensors.
    path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata))


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; raises ``CheckpointError`` if it is of another format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: {error}.", remedy="Copy the file from its source again."
        ) from error


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Read safetensors; raises ``CheckpointError`` if the file is truncated or of another format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: {error}.", remedy="Copy the file from its source again."
        ) from error


def build_student(spec: StudentSpec) -> "Student":
    """The student that ``spec`` describes, with its branches and fresh weights, in training mode."""
    from kdexport.reparam.blocks import attach_branches
    from kdexport.students import STUDENTS

    student = STUDENTS.build(spec.student, num_classes=spec.num_classes, image_size=spec.image_size)
    if spec.branches is not None:
        attach_branches(student, spec.branches)
    return student


def load_student(trained: TrainedStudent) -> "Student":
    """The unfused student with its trained weights, in evaluation mode."""
    student = build_student(trained.spec)
    load_strictly(student, load_tensors(trained.weights), str(trained.weights))
    return student.eval()


def load_strictly(module: "nn.Module", tensors: "dict[str, Tensor]", source: str) -> None:
    """Load ``tensors`` into ``module``.

    Raises ``CheckpointError`` if one is missing, unknown, of another shape or type, or not finite.
    """
    own = module.state_dict()
    missing, foreign = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    misshapen = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ] + [
        f"{name} is {tensors[name].dtype}, not {own[name].dtype}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].dtype != tensors[name].dtype
    ]
    if missing or foreign or misshapen:
        facts = [
            f"{len(names)} {what}, first {names[0]!r}"
            for what, names in (
                ("tensors missing", missing),
                ("tensors unknown", foreign),
                ("tensors of another shape or type", misshapen),
            )
            if names
        ]
        hint = f" {nearest(foreign[0], missing)}" if foreign and missing and len(missing) < 20 else ""
        raise CheckpointError(
            f"{source} does not fit the model: {'; '.join(facts)}.{hint}",
            remedy="Use the student, number of classes and branches that it was trained with.",
        )
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{source} holds NaN or infinite values, first in {bad[0]!r}.",
            remedy="The training run diverged: train again with a smaller learning_rate.",
        )
    module.load_state_dict(tensors)
