"""Digests: of files and bytes, of JSON values, and of the source code and packages that make a result."""

import functools
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def sha256_bytes(data: bytes) -> str:
    """sha256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
    root = Path(__file__).parents[1]
    hasher = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        hasher.update(str(path.relative_to(root)).encode())
        hasher.update(path.read_bytes())
    return hasher.hexdigest()
