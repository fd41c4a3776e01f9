"""A Triton model repository on disk: what in it is ours, and how a version enters it whole.

Triton takes every folder of a repository for a model, hidden or not, so nothing is staged inside: files are written
beside the repository and enter it by rename.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdexport.core.files import exclusive, publish
from kdexport.errors import OutputError, StorageError
from kdexport.serving.triton.pbtxt import CONFIG, LABELS, WARMUP

#: Beside each model file: what the version is and what all versions of its model must agree on.
ORIGIN = "kdexport.json"
_REMEDY = "Pass another --repository, or move what is in it away; nothing was changed."


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a model that kdexport wrote."""

    number: int
    origin: dict[str, Any]


def require_repository(repository: Path) -> None:
    """Raise ``OutputError`` unless ``repository`` is absent, empty, or holds Triton models and nothing else."""
    if not repository.exists():
        return
    if not repository.is_dir():
        raise OutputError(f"{repository} is not a folder.", remedy=_REMEDY)
    entries = sorted(path for path in repository.iterdir() if not path.name.startswith("."))
    foreign = [path for path in entries if not (path.is_dir() and _is_model(path))]
    if foreign:
        raise OutputError(
            f"{repository} is not a Triton model repository: {foreign[0].name} is no model "
            f"({len(foreign)} of {len(entries)} entries).",
            remedy=_REMEDY,
        )


def _is_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or bool(_numbers(folder))


def _numbers(folder: Path) -> list[int]:
    # Triton ignores a leading zero, so 01 is no version.
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and not name.startswith("0"))


def read_versions(model: Path) -> tuple[Version, ...]:
    """Versions of a model folder in rising order; raises ``OutputError`` where one was not written by kdexport."""
    if model.is_symlink() or (model.exists() and not model.is_dir()):
        raise OutputError(f"{model} is not a folder of its own.", remedy="Pass another --name; nothing was changed.")
    if not model.exists() or not any(model.iterdir()):
        return ()
    numbers = _numbers(model)
    if not numbers:
        raise OutputError(
            f"{model} exists and was not written by kdexport: it holds no version.",
            remedy="Pass another --name; nothing was changed.",
        )
    return tuple(Version(number, _read_origin(model / str(number))) for number in numbers)


def _read_origin(folder: Path) -> dict[str, Any]:
    try:
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        if not isinstance(origin["contract"], dict) or not isinstance(origin["sha256"], str):
            raise TypeError("not what kdexport writes")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{folder} was not written by kdexport: {ORIGIN} is missing or damaged ({type(error).__name__}).",
            remedy="Pass another --name: versions of different origin would share one config.pbtxt.",
        ) from None
    return dict(origin)


@contextlib.contextmanager
def staging(repository: Path) -> Iterator[Path]:
    """An empty folder beside ``repository`` while that is held against other processes; removed at the end."""
    created = not repository.exists()
    repository.mkdir(parents=True, exist_ok=True)
    place = repository.resolve()
    folder = place.with_name(f".{place.name}.kdexport-new")
    try:
        _require_one_file_system(place)
        with exclusive(place):
            # Under the lock, what lies there was left by a process that is gone.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        if created:
            with contextlib.suppress(OSError):
                repository.rmdir()


def _require_one_file_system(place: Path) -> None:
    if place.stat().st_dev != place.parent.stat().st_dev:
        raise StorageError(
            f"{place} is a mount of its own, and files cannot enter it whole from {place.parent}.",
            remedy=f"Pass a folder inside it, for example --repository {place / 'models'}.",
        )


def enter(staged: Path, model: Path, version: int) -> None:
    """Put the staged model folder, complete with one version, in the place of ``model`` or its version beside others.

    The version comes last: a Triton that polls sees it when all that it needs is there.
    """
    if not model.exists() or not any(model.iterdir()):
        # rename replaces an empty folder.
        publish(staged, model)
        return
    warmups = [path.name for path in (staged / WARMUP).iterdir()]
    (model / WARMUP).mkdir(exist_ok=True)
    for name in (LABELS, *(f"{WARMUP}/{warmup}" for warmup in warmups), CONFIG):
        _replace(staged / name, model / name)
    if (staged / str(version)).exists():
        publish(staged / str(version), model / str(version))
    for path in (model / WARMUP).iterdir():
        if path.name not in warmups:
            path.unlink()


def _replace(source: Path, target: Path) -> None:
    if target.is_file() and target.read_bytes() == source.read_bytes():
        # Its time tells a polling Triton whether to load the model again.
        return
    with source.open("rb") as stream:
        os.fsync(stream.fileno())
    source.replace(target)
