"""The slim form of a bundle: what serving, doctor and the gate need, without what only verification reads."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdexport.backends.base import ONNX_FILE
from kdexport.bundle.layout import CARD, GOLDEN, MANIFEST, TARGETS, TASK
from kdexport.bundle.manifest import (
    EMPTY_FOLDER,
    Manifest,
    irregular_entries,
    read_manifest,
    require_unchanged,
)
from kdexport.core.digests import sha256_file
from kdexport.core.files import exclusive, require_replaceable, require_writable, write_folder
from kdexport.errors import BundleError, NotExecutedError, UnknownNameError
from kdexport.registry import nearest
from kdexport.targets import DEFAULT_TARGET


@dataclass(frozen=True, kw_only=True, slots=True)
class SlimBundle:
    """A slim bundle that was written: its size and that of the whole one in bytes, and the files that it lacks."""

    out: str
    bytes: int
    whole_bytes: int
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def write_slim(folder: Path, out: Path, targets: Sequence[str] = ()) -> SlimBundle:
    """Write the slim form of the bundle ``folder`` to ``out``, with ``targets`` or all that it has.

    Raises ``BundleError`` for a bundle that is slim already or whose checks did not hold, ``VerificationError`` if its
    files have changed, ``UnknownNameError`` for a target that it lacks, and ``OutputError`` if ``out`` holds something
    else than a slim bundle.
    """
    manifest = read_manifest(folder)
    if is_slim(manifest):
        raise BundleError(f"{folder} is a slim bundle already.", remedy="Copy it with cp -r.")
    require_sound(folder, manifest)
    kept_targets = _chosen(manifest, targets)
    require_replaceable(out, _is_slim_folder)
    require_writable(out)
    kept = [name for name in manifest.files if _is_kept(name, manifest, kept_targets)]
    left_out = tuple(sorted(manifest.files.keys() - set(kept)))
    data = {
        **manifest.data,
        "files": {name: manifest.files[name] for name in kept},
        "targets": {name: manifest.targets[name] for name in kept_targets},
        "slim": {"manifest_sha256": sha256_file(folder / MANIFEST), "left_out": list(left_out)},
    }
    # A file that is left out.
    data.pop("answers", None)

    def fill(incoming: Path) -> None:
        for name in kept:
            (incoming / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, incoming / name)
        (incoming / MANIFEST).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        # What was copied is what the manifest says, although the bundle may have changed meanwhile.
        require_unchanged(incoming, read_manifest(incoming))

    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(out.parent):
        write_folder(out, fill)
    return SlimBundle(out=str(out), bytes=_size(out), whole_bytes=_size(folder), left_out=left_out)


def is_slim(manifest: Manifest) -> bool:
    """Whether a manifest is that of a slim bundle."""
    return manifest.data.get("slim") is not None


def require_whole(folder: Path, manifest: Manifest) -> None:
    """Raise ``NotExecutedError`` for a slim bundle, which lacks the student that everything is compared with."""
    if is_slim(manifest):
        whole = str(manifest.data["slim"].get("manifest_sha256", ""))
        raise NotExecutedError(
            f"{folder} is a slim bundle: it has no unfused student, which this command compares with.",
            remedy=f"Run kdexport doctor {folder}, which checks files and golden images; or take the bundle that it "
            f"was made of, whose {MANIFEST} has the sha256 {whole[:16]}...",
        )


def require_sound(folder: Path, manifest: Manifest) -> None:
    """Raise ``BundleError`` for links or checks that did not hold, ``VerificationError`` for files that changed."""
    require_unchanged(folder, manifest)
    require_regular(folder)
    checks = manifest.data["parity"]
    failed = sum(not check["holds"] and check.get("ran", True) for check in checks)
    if failed or not checks:
        raise BundleError(
            f"{folder} is not verified: {failed} of {len(checks)} checks failed (0 of one or more allowed).",
            remedy="Build the bundle again; only verified bundles are made slim or sent.",
        )


def require_regular(folder: Path) -> None:
    """Raise ``BundleError`` if the bundle has a link, a device or anything else that is not a file of its own."""
    irregular = {name: kind for name, kind in irregular_entries(folder).items() if kind != EMPTY_FOLDER}
    if irregular:
        name, kind = next(iter(irregular.items()))
        raise BundleError(
            f"{folder / name} is {kind}; a bundle may have regular files only.",
            remedy=f"Copy the bundle with the contents of its links: cp -rL {folder} NEW_FOLDER",
        )


def _chosen(manifest: Manifest, targets: Sequence[str]) -> tuple[str, ...]:
    for name in targets:
        if name not in manifest.targets:
            raise UnknownNameError(f"The bundle has no target {name!r}.", remedy=nearest(name, manifest.targets))
    return tuple(name for name in manifest.targets if not targets or name in targets)


def _is_kept(name: str, manifest: Manifest, targets: Sequence[str]) -> bool:
    folder, _, rest = name.partition("/")
    if folder == TARGETS:
        target = rest.partition("/")[0]
        # The default target is the model itself, which is stored once.
        twin = target == DEFAULT_TARGET and manifest.files[name] == manifest.files.get(ONNX_FILE)
        return target in targets and not twin
    return folder == GOLDEN or name in (TASK, ONNX_FILE, CARD)


def _is_slim_folder(folder: Path) -> bool:
    try:
        return is_slim(read_manifest(folder))
    except BundleError:
        return False


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
