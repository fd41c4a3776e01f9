"""What a build keeps if its verification fails: the folder with its report, and the place of the fault."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kdexport.core.files import replace_folder, require_replaceable, require_writable, scratch_folder
from kdexport.errors import KdexportError, MachineError, OutputError, VerificationError

if TYPE_CHECKING:
    from kdexport.bundle.manifest import Manifest
    from kdexport.diagnose.bisect import Blame


def keep_failed(
    error: VerificationError, folder: Path, place: Path, *, blame: bool, progress: Callable[[str], None]
) -> VerificationError:
    """Copy ``folder`` to ``place``; return the error with its path, and with ``blame`` also the node at fault."""
    replace_folder(folder, place)
    lines = [error.message, f"Report: {place / 'report.md'}"]
    if blame:
        lines += _blame(place, progress)
    return VerificationError("\n".join(lines), remedy=error.remedy)


def _blame(failed: Path, progress: Callable[[str], None]) -> list[str]:
    try:
        return blame_lines(blame_bundle(failed, failed.with_name(f"{failed.name}-blame"), progress))
    except KdexportError as error:
        # The failure itself must be reported even if its cause cannot be found.
        return [f"Blame: {error.message}"]


def blame_bundle(bundle: Path, out: Path, progress: Callable[[str], None]) -> "Blame | None":
    """Find the first fault of ``bundle`` and write it to ``out``, which is replaced as a whole.

    Nothing is written if every stage is right.
    """
    from kdexport.bundle.manifest import read_manifest
    from kdexport.diagnose.bisect import REPORT, write_blame

    manifest = read_manifest(bundle)
    try:
        require_replaceable(out, lambda folder: (folder / REPORT).is_file())
    except OutputError as error:
        raise OutputError(
            f"{out} exists and was not written by kdexport explain-failure.", remedy=error.remedy
        ) from None
    require_writable(out)
    with scratch_folder("explain") as place:
        made = place / "blame"
        found = _explained(bundle, manifest, made, progress)
        if found is None:
            return None
        found = found.moved(out)
        write_blame(made, found)
        replace_folder(made, out)
    return found


def _explained(bundle: Path, manifest: "Manifest", made: Path, progress: Callable[[str], None]) -> "Blame | None":
    """The finding of ``explain``; a file that differs from the manifest where the cause is not in a stage of the build.

    Golden images and their logits are what everything is compared with, so a change of them is told at once.
    """
    from kdexport.bundle.manifest import GOLDEN, changed_files
    from kdexport.diagnose.bisect import changed_file, explain

    progress("files")
    changes = changed_files(bundle, manifest.files)
    golden = {name: change for name, change in changes.items() if name.startswith(f"{GOLDEN}/")}
    if golden:
        return changed_file(golden)
    try:
        found = explain(bundle, manifest, made, progress)
    except MachineError:
        raise
    # A changed file is the cause, whatever the library that reads it raises.
    except Exception:
        if changes:
            return changed_file(changes)
        raise
    return found or (changed_file(changes) if changes else None)


def blame_lines(found: "Blame | None") -> list[str]:
    """The lines that a terminal shows for a finding."""
    if found is None:
        return ["Every stage, from the unfused weights to the files, is right on the golden images."]
    lines = [f"Blamed: {found.sentence()}."]
    if found.reproduction:
        lines.append(f"Reproduce: python {found.reproduction}/reproduce.py   (needs only numpy and onnxruntime)")
    return lines
