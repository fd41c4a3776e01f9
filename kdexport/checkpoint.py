"""A trained student on disk: a folder with student.json and model.safetensors; nothing is pickled.

The network of a student of another origin is in it too, as program.json (see ``origins.stored_program``).
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdexport.core.digests import sha256_file
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import CheckpointError
from kdexport.origins.file_formats import unreadable_tensors
from kdexport.registry import nearest
from kdexport.reparam.spec import BranchSpec

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

    from kdexport.students import Student

SCHEMA_VERSION = 1
_SPEC, _WEIGHTS = "student.json", "model.safetensors"
PROGRAM = "program.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentSpec:
    """Everything that is needed to build a student and to prepare its input, except its weights."""

    student: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    branches: BranchSpec | None
    provenance: dict[str, Any]
    #: sha256 of program.json; empty for a registered student, whose code is its program.
    program_sha256: str = ""
    #: The form of a registered student (``students.student.Form``); "auto" is chosen by the size of the images.
    form: str = "auto"

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
        program = {"program_sha256": self.program_sha256} if self.program_sha256 else {}
        form = {} if self.form == "auto" else {"form": self.form}
        return {
            **program,
            **form,
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
        known = (
            *("schema_version", "student", "classes", "preprocessing", "branches", "provenance"),
            *("program_sha256", "form"),
        )
        unknown = sorted(data.keys() - set(known))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(known)}")
        branches, classes = data["branches"], data["classes"]
        if not isinstance(classes, list) or not classes:
            raise ValueError("classes is not a list of at least one name")
        if data.get("form", "auto") not in ("auto", "small", "full"):
            raise ValueError(f"form is {data['form']!r}; it must be one of auto, small, full")
        return cls(
            student=str(data["student"]),
            classes=tuple(str(name) for name in classes),
            preprocessing=Preprocessing.from_json(data["preprocessing"]),
            branches=None if branches is None else BranchSpec.from_json(branches),
            provenance=dict(data["provenance"]),
            program_sha256=str(data.get("program_sha256", "")),
            form=str(data.get("form", "auto")),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedStudent:
    """A checkpoint on disk whose description was read and whose weights were hashed."""

    weights: Path
    weights_sha256: str
    spec: StudentSpec
    #: sha256 of the source of the plugin that defines the student; empty for a student of this package.
    plugin_sha256: str = ""

    @property
    def program(self) -> Path:
        """The file of the network of a student of another origin; registered students have none."""
        return self.weights.with_name(PROGRAM)


def open_checkpoint(directory: Path) -> TrainedStudent:
    """Read student.json and hash the weights; raises ``CheckpointError`` if one is missing or not readable."""
    spec_path, weights = directory / _SPEC, directory / _WEIGHTS
    _require_files(directory, _SPEC, _WEIGHTS)
    try:
        spec = StudentSpec.from_json(json.loads(spec_path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{spec_path} does not describe a student: {type(error).__name__}: {error}.",
            remedy="Pass a folder written by this version of kdexport train.",
        ) from error
    if spec.program_sha256:
        _require_files(directory, PROGRAM)
    return TrainedStudent(weights=weights, weights_sha256=sha256_file(weights), spec=spec)


def _require_files(directory: Path, *names: str) -> None:
    if (directory / "teacher.json").is_file():
        raise CheckpointError(
            f"{directory} holds a teacher, not a student.",
            remedy=f"To distil from it, pass --teacher-checkpoint {directory / _WEIGHTS}. A student is in the folder "
            "student of a run.",
        )
    for name in names:
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory} is not a student checkpoint: it has no {name}.",
                remedy="Pass a folder written by kdexport train (student.json and model.safetensors).",
            )


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
        raise unreadable_tensors(path, error) from error


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Read safetensors; raises ``CheckpointError`` if the file is truncated or of another format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise unreadable_tensors(path, error) from error


def save_program_checkpoint(directory: Path, graph: "fx.GraphModule", spec: StudentSpec) -> StudentSpec:
    """Write a checkpoint folder of the network ``graph``: one functional graph from images (N,3,S,S) to logits (N,K).

    Returns ``spec`` with the digest of the program. Not atomic, like ``save_checkpoint``. Raises ``ReparamError`` for
    an operator that cannot be stored.
    """
    from kdexport.origins.stored_program import store_program

    program, weights = store_program(graph, spec.image_size)
    text = json.dumps(program, indent=0, sort_keys=True) + "\n"
    stored = replace(spec, program_sha256=hashlib.sha256(text.encode()).hexdigest())
    directory.mkdir(parents=True, exist_ok=True)
    (directory / PROGRAM).write_text(text, encoding="utf-8")
    save_tensors(directory / _WEIGHTS, weights)
    (directory / _SPEC).write_text(json.dumps(stored.to_json(), indent=2, sort_keys=True) + "\n")
    return stored


def load_network(spec: StudentSpec, weights: Path, program: Path) -> "nn.Module":
    """The unfused network of ``spec`` with its trained ``weights``, in evaluation mode.

    ``program`` is read for a student of another origin, a ``fx.GraphModule``; otherwise the result is a ``Student``.
    Raises ``CheckpointError`` for a program that is not the one of ``spec``.
    """
    tensors = load_tensors(weights)
    if not spec.program_sha256:
        student = build_student(spec)
        load_strictly(student, tensors, str(weights))
        return student.eval()
    from kdexport.origins.stored_program import read_program

    try:
        text = program.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{program} cannot be read: {error.strerror}.", remedy="Copy the whole folder again."
        ) from error
    if hashlib.sha256(text).hexdigest() != spec.program_sha256:
        raise CheckpointError(
            f"{program} is not the program of {spec.student}: its sha256 differs from the one in the description.",
            remedy="Copy the whole folder again.",
        )
    graph = read_program(text.decode(), tensors, str(program))
    require_finite(tensors, str(weights))
    return graph


def load_student(trained: TrainedStudent) -> "nn.Module":
    """The unfused student with its trained weights, in evaluation mode."""
    return load_network(trained.spec, trained.weights, trained.program)


def build_student(spec: StudentSpec) -> "Student":
    """The registered student that ``spec`` describes, with its branches and fresh weights, in training mode."""
    from kdexport.reparam.blocks import attach_branches
    from kdexport.students import STUDENTS

    # A plugin's student has no forms, and need not take this argument.
    form = {} if spec.form == "auto" else {"form": spec.form}
    student = STUDENTS.build(spec.student, num_classes=spec.num_classes, image_size=spec.image_size, **form)
    if spec.branches is not None:
        attach_branches(student, spec.branches)
    return student


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
    require_finite(tensors, source)
    module.load_state_dict(tensors)


def require_finite(tensors: "dict[str, Tensor]", source: str) -> None:
    """Raise ``CheckpointError`` if a tensor holds NaN or an infinite value."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{source} holds NaN or infinite values, first in {bad[0]!r}.",
            remedy="The training run diverged: train again with a smaller learning_rate.",
        )
