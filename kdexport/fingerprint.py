"""Digests of what a stage reads: JSON values, source code, and whole data sets without reading them twice."""

import contextlib
import functools
import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from kdexport.data import DatasetSpec, open_dataset, sources
from kdexport.errors import DataError


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tool_versions(*packages: str) -> dict[str, str]:
    """Installed versions by package name, read from metadata, so that nothing is imported."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


@functools.cache
def source_digest() -> str:
    """sha256 over kdexport's own code: a stage's result is reused only by the code that made it."""
    root = Path(__file__).parent
    hasher = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        hasher.update(str(path.relative_to(root)).encode())
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


def dataset_digest(spec: DatasetSpec, memory: Path) -> str:
    """sha256 over both splits of a data set. Content is read once; names, sizes and times decide whether it changed."""
    listing = digest(
        {
            "name": spec.name.partition(":")[0],
            "versions": tool_versions("scikit-learn", "pillow"),
            "files": _listing(spec),
        }
    )
    remembered = memory / f"{listing}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(remembered.read_text())["sha256"])
    train, test = open_dataset(spec, "train"), open_dataset(spec, "test")
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"The training and test splits have different classes; only in one of them: {', '.join(only[:5])}.",
            remedy="Give every class a folder with images in both splits.",
        )
    value = digest([train.fingerprint(), test.fingerprint()])
    memory.mkdir(parents=True, exist_ok=True)
    partial = remembered.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps({"sha256": value}))
    partial.replace(remembered)
    return value


def _listing(spec: DatasetSpec) -> list[tuple[str, int, int]]:
    entries = []
    for path in sources(spec):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        entries.append((str(path.absolute()), status.st_size, status.st_mtime_ns))
    return entries
