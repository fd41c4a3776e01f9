"""What is left of a build whose verification failed: the folder with its report, and where its fault lies."""

import shutil
from collections.abc import Callable
from pathlib import Path

from kdexport.errors import KdexportError, VerificationError


def keep_failed(
    error: VerificationError, folder: Path, place: Path, *, blame: bool, progress: Callable[[str], None]
) -> VerificationError:
    """Copy ``folder`` to ``place``; the error that names it, and with ``blame`` the node that is at fault."""
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, place)
    lines = [error.message, f"Report: {place / 'report.md'}"]
    if blame:
        lines += _blame(place, progress)
    return VerificationError("\n".join(lines), remedy=error.remedy)


def _blame(failed: Path, progress: Callable[[str], None]) -> list[str]:
    from kdexport.blame_command import blame_bundle, blame_lines

    try:
        return blame_lines(blame_bundle(failed, failed.with_name(f"{failed.name}-blame"), progress))
    except KdexportError as error:
        # The failure itself must be told even where its cause cannot be found.
        return [f"Blame: {error.message}"]
