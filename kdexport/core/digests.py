"""Digests of files, bytes and JSON values, and versions of installed packages."""

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
    """Installed versions by package name, or ``absent``; read from metadata without importing."""
    return {package: _installed(package) for package in packages}


@functools.cache
def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
