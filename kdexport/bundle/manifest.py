"""The bundle on disk: its layout, its manifest, and the digests of its files."""

import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from kdexport.backends import BACKENDS
from kdexport.backends.base import ONNX_FILE, PRECISIONS
from kdexport.backends.file_interface import PLAIN_INTERFACE, FileInterface
from kdexport.bundle.layout import (
    FUSED,
    GOLDEN,
    GOLDEN_LOGITS,
    MANIFEST,
    RANGES,
    SIGNATURE,
    SYNTHETIC_IMAGES,
    TARGETS,
    TASK,
    TRAINED_FOR,
    UNFUSED,
    UNIT_ERROR,
)
from kdexport.bundle.manifest_fields import require_fields
from kdexport.checkpoint import PROGRAM, StudentSpec, load_network
from kdexport.core.digests import sha256_file
from kdexport.errors import BundleError, VerificationError
from kdexport.graph.plan import LayerPlan
from kdexport.targets import Target, parse_target, target_names

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

__all__ = [
    "EMPTY_FOLDER",
    "FUSED",
    "GOLDEN",
    "GOLDEN_LOGITS",
    "HARD_LINK",
    "MANIFEST",
    "MODEL",
    "NOT_EXECUTED",
    "RANGES",
    "SCHEMA_VERSION",
    "TARGETS",
    "TASK",
    "UNFUSED",
    "UNIT_ERROR",
    "VERIFIED",
    "Manifest",
    "changed_files",
    "has_synthetic_images",
    "hash_files",
    "interface_of",
    "irregular_entries",
    "layer_plans",
    "listed_changes",
    "load_unfused",
    "onnx_files",
    "read_golden",
    "read_manifest",
    "require_unchanged",
    "target_of",
    "trained_weights",
    "write_golden",
]

SCHEMA_VERSION = 1
_MIN_SIZE, _MAX_SIZE = 8, 4096

_LISTED_CHANGES = 5

MODEL = ONNX_FILE
#: The status of a target.
EMPTY_FOLDER = "an empty folder"
HARD_LINK = "a hard link"

VERIFIED, NOT_EXECUTED = "verified", "built, not executed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The manifest of a bundle, checked; ``data`` is the whole JSON object."""

    data: dict[str, Any]
    spec: StudentSpec
    files: dict[str, str]
    targets: dict[str, dict[str, Any]]
    build_key: str
    opset: int
    golden: tuple[str, ...]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Manifest":
        """Read a manifest's JSON object; raises ``KeyError``, ``TypeError`` or ``ValueError`` for other JSON,
        ``BundleError`` for a target whose backend is not registered.
        """
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {data['schema_version']!r}, this version reads {SCHEMA_VERSION}")
        require_fields(data)
        for name in (*data["golden"], *data["files"]):
            _require_inside(str(name))
        _require_sound(data)
        return cls(
            data=data,
            spec=StudentSpec.from_json({**data["student"], "provenance": data["provenance"]}),
            files={str(name): str(value) for name, value in data["files"].items()},
            targets=dict(data["targets"]),
            build_key=str(data["build_key"]),
            opset=int(data["opset"]),
            golden=tuple(str(name) for name in data["golden"]),
        )


def _require_sound(data: dict[str, Any]) -> None:
    """Check what the verification relies on beyond the types of the fields: targets and the image size."""
    for name, entry in data["targets"].items():
        _require_known_backend(name)
        if name not in target_names() or entry["precision"] != name.rpartition("-")[2]:
            raise ValueError(f"the target {name!r} has the precision {entry['precision']!r}")
        if bool(entry["engine"]) != parse_target(name).compiles or entry["status"] not in (VERIFIED, NOT_EXECUTED):
            raise ValueError(f"the target {name!r} has engine {entry['engine']!r} and status {entry['status']!r}")
        if "plan" in entry:
            LayerPlan.from_json(entry["plan"])
        if "quantize_aware" in entry and entry["quantize_aware"]["weights"] != TRAINED_FOR.get(parse_target(name).form):
            raise ValueError(f"the target {name!r} has the weights {entry['quantize_aware']['weights']!r}")
    size = data["student"]["preprocessing"]
    for key in ("image_size", "resize"):
        if not _MIN_SIZE <= size[key] <= _MAX_SIZE:
            raise ValueError(f"{key} is {size[key]}, expected {_MIN_SIZE} to {_MAX_SIZE}")


def _require_known_backend(target: str) -> None:
    name, _, precision = target.rpartition("-")
    if precision in PRECISIONS and re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) and name not in BACKENDS.names():
        raise BundleError(
            f"The bundle was built for the target {target!r}, and there is no backend named {name!r} here.",
            remedy="Pass --plugin FILE.py, or install the package that has the backend. "
            f"Known: {', '.join(BACKENDS.names())}.",
        )


def _require_inside(name: str) -> None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"the path {name!r} is outside the bundle")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle folder; raises ``BundleError`` if it is missing or cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}.", remedy="Pass a folder written by kdexport build."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        # JSON can spell a lone surrogate, which no terminal and no file can show.
        json.dumps(data, ensure_ascii=False).encode("utf-8")
        return Manifest.from_json(data)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BundleError(
            f"{path} is damaged or was written by another version: {type(error).__name__}: {error}.",
            remedy="Build the bundle again.",
        ) from error


def hash_files(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder`` except the manifest and the signature, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: sha256_file(path) for name, path in names.items() if name not in (MANIFEST, SIGNATURE)}


def irregular_entries(folder: Path) -> dict[str, str]:
    """Entries of a bundle folder that are neither regular files nor folders with files, by relative path.

    Digests do not cover them: a link can lead to a file outside of the bundle, which can change later.
    """
    found = {}
    pending = [folder] if folder.is_dir() else []
    while pending:
        place = pending.pop()
        with os.scandir(place) as entries:
            inside = list(entries)
        if not inside and place != folder:
            found[place.relative_to(folder).as_posix()] = EMPTY_FOLDER
        for entry in inside:
            facts = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(facts.st_mode):
                pending.append(Path(entry.path))
            elif kind := _irregular(facts):
                found[Path(entry.path).relative_to(folder).as_posix()] = kind
    return dict(sorted(found.items()))


def _irregular(facts: os.stat_result) -> str:
    if stat.S_ISLNK(facts.st_mode):
        return "a symbolic link"
    if not stat.S_ISREG(facts.st_mode):
        return "a device, pipe or socket"
    return HARD_LINK if facts.st_nlink != 1 else ""


def changed_files(folder: Path, expected: dict[str, str]) -> dict[str, str]:
    """Files that differ from the manifest, each as ``missing``, ``changed`` or ``unknown`` (not in the manifest)."""
    present = hash_files(folder)
    changes = dict.fromkeys(expected.keys() - present.keys(), "missing")
    changes.update(dict.fromkeys(present.keys() - expected.keys(), "unknown"))
    changes.update({name: "changed" for name in expected.keys() & present.keys() if expected[name] != present[name]})
    return dict(sorted(changes.items()))


def listed_changes(changes: dict[str, str]) -> str:
    """The first few of ``changed_files`` as one line, for an error message."""
    return ", ".join(f"{name} {change}" for name, change in list(changes.items())[:_LISTED_CHANGES])


def require_unchanged(folder: Path, manifest: Manifest) -> None:
    """Raise ``VerificationError`` that names the files that differ from those of the manifest."""
    changes = changed_files(folder, manifest.files)
    if changes:
        raise VerificationError(
            f"{len(changes)} files of {folder} differ from the manifest: {listed_changes(changes)}.",
            remedy="Copy the bundle again, or build it again.",
        )


def write_golden(folder: Path, images: Iterable[tuple[bytes, str]]) -> list[str]:
    """Write original image bytes with their suffixes; return their paths relative to the bundle."""
    (folder / GOLDEN).mkdir(parents=True)
    names = []
    for index, (data, suffix) in enumerate(images):
        name = f"{GOLDEN}/{index:03d}{suffix}"
        (folder / name).write_bytes(data)
        names.append(name)
    return names


def read_golden(folder: Path, manifest: Manifest) -> "NDArray[np.uint8]":
    """The golden images through the bundle's own preprocessing: (N,S,S,3) uint8."""
    import numpy as np

    from kdexport.data.preprocessing import read_image

    preprocessing = manifest.spec.preprocessing
    return np.stack([preprocessing.pixels(read_image(folder / name)) for name in manifest.golden])


def has_synthetic_images(data: dict[str, Any]) -> bool:
    """Whether the golden images of a bundle are computed; its manifest is ``data``."""
    return bool((data.get("golden_images") or {}).get("kind") == SYNTHETIC_IMAGES)


def layer_plans(manifest: Manifest) -> dict[str, LayerPlan]:
    """The precision plan of each target that has one, by target."""
    return {name: LayerPlan.from_json(entry["plan"]) for name, entry in manifest.targets.items() if "plan" in entry}


def trained_weights(manifest: Manifest) -> dict[str, str]:
    """The file of the weights that quantize-aware training made, by int8 form; empty without such a training."""
    found = {}
    for name, entry in manifest.targets.items():
        if "quantize_aware" in entry:
            found[parse_target(name).form] = TRAINED_FOR[parse_target(name).form]
    return found


def onnx_files(manifest: Manifest) -> dict[str, str]:
    """ONNX files of a bundle by relative path, with the form of each."""
    files = {MODEL: "fp32"}
    for name in manifest.targets:
        files[f"{TARGETS}/{name}/{MODEL}"] = parse_target(name).form
    return files


def interface_of(manifest: Manifest, target: str) -> FileInterface:
    """What the file of ``target`` takes and gives; bundles of earlier versions do not say it, and theirs are plain."""
    entry, plain = manifest.targets.get(target, {}), PLAIN_INTERFACE
    return FileInterface(entry.get("input", plain.takes), entry.get("output", plain.gives))


def target_of(name: str) -> Target | None:
    """The target of the ONNX file ``name``; None for the exported model of the bundle itself."""
    place = PurePosixPath(name)
    inside = place.parent.parent.as_posix() == TARGETS and place.name == MODEL
    return parse_target(place.parent.name) if inside else None


def load_unfused(folder: Path, spec: StudentSpec) -> "nn.Module":
    """The unfused student of a bundle, in evaluation mode."""
    return load_network(spec, folder / UNFUSED, folder / PROGRAM)
