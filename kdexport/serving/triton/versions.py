"""A Triton model repository on disk: which versions kdexport wrote, and how a new one is added in one step.

Triton reads every folder of a repository as a model, even a hidden one. New files are therefore written beside the
repository and moved into it by rename.
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

#: The file beside each model with its origin and the values that all versions of the model must share.
ORIGIN = "kdexport.json"
_REMEDY = "Nothing was changed. Pass another --repository, or move its content elsewhere."


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a model that kdexport wrote."""

    number: int
    origin: dict[str, Any]


def require_repository(repository: Path) -> None:
    """Raise ``OutputError`` unless ``repository`` does not exist, is empty, or has only Triton models."""
    if not repository.exists():
        return
    if not repository.is_dir():
        raise OutputError(f"{repository} is not a folder.", remedy=_REMEDY)
    entries = sorted(path for path in repository.iterdir() if not path.name.startswith("."))
    foreign = [path for path in entries if not (path.is_dir() and _is_model(path))]
    if foreign:
        raise OutputError(
            f"{repository} is not a Triton model repository: {len(foreign)} of its {len(entries)} entries are not "
            f"models, e.g. {foreign[0].name}.",
            remedy=_REMEDY,
        )


def _is_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or bool(_numbers(folder))


def _numbers(folder: Path) -> list[int]:
    # Triton ignores folders with a leading zero, such as 01.
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and not name.startswith("0"))


def read_versions(model: Path) -> tuple[Version, ...]:
    """The versions of a model folder in ascending order; raises ``OutputError`` if kdexport did not write one."""
    if model.is_symlink() or (model.exists() and not model.is_dir()):
        raise OutputError(
            f"{model} is a link or a file; the folder of a model must be a real folder.",
            remedy="Nothing was changed. Pass another --name.",
        )
    if not model.exists() or not any(model.iterdir()):
        return ()
    numbers = _numbers(model)
    if not numbers:
        raise OutputError(
            f"{model} exists and was not written by kdexport: it has no version.",
            remedy="Nothing was changed. Pass another --name.",
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
            remedy="Pass another --name, because all versions of a model share one config.pbtxt.",
        ) from None
    return dict(origin)


@contextlib.contextmanager
def staging(repository: Path) -> Iterator[Path]:
    """An empty folder beside ``repository``, which is locked against other processes; removed at the end."""
    created = not repository.exists()
    repository.mkdir(parents=True, exist_ok=True)
    place = repository.resolve()
    folder = place.with_name(f".{place.name}.kdexport-new")
    try:
        _require_one_file_system(place)
        with exclusive(place):
            # With the lock held, an existing folder was left by a process that was killed.
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
            f"{place} is a mount point, so files cannot be renamed into it from {place.parent}.",
            remedy=f"Pass a folder inside it, for example --repository {place / 'models'}.",
        )


def publish_version(staged: Path, model: Path, version: int) -> None:
    """Move a staged model folder with one version to ``model``, or its version beside those that exist.

    The version is moved last, so that a polling Triton finds it only when all other files are there.
    """
    if not model.exists() or not any(model.iterdir()):
        # A rename replaces an empty folder.
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
        # A polling Triton loads the model again if the file's time changes.
        return
    with source.open("rb") as stream:
        os.fsync(stream.fileno())
    source.replace(target)
