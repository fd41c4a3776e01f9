"""Verification of a finished bundle from its own files alone."""

from collections.abc import Callable
from pathlib import Path

from kdexport.bundle import Manifest, read_golden
from kdexport.errors import DataError
from kdexport.verify.parity import check_at_most
from kdexport.verify.subjects import check_golden, check_integrity
from kdexport.verify.verdict import Verdict, verify_folder


def replay(folder: Path, manifest: Manifest, progress: Callable[[str], None]) -> Verdict:
    """Files, golden images from their bytes, and the whole ladder on them; a failure stops no later check."""
    progress("files")
    checks = check_integrity(folder, manifest)
    try:
        pixels = read_golden(folder, manifest)
    except DataError as error:
        broken = check_at_most("golden", "images", "readable", 1, 0, unit="faults", detail=error.message)
        return Verdict((*checks, broken))
    progress("golden images")
    checks += check_golden(folder, manifest, pixels)
    return Verdict((*checks, *verify_folder(folder, manifest, pixels, progress=progress).checks))
