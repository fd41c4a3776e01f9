"""Bundles whose manifests were edited."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdexport.bundle.manifest import MANIFEST


def edited(bundle: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """``bundle`` with its manifest changed, and the digests of all its files written again."""
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    for path in bundle.rglob("*"):
        if path.is_file() and path.name != MANIFEST:
            data["files"][str(path.relative_to(bundle))] = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(data))
    return bundle


def rewritten(bundle: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """``bundle`` with its manifest changed and nothing else."""
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))
    return bundle
