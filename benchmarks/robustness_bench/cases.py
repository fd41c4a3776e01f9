"""What a case is, and how its end is judged; needs neither torch nor onnx."""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from kdexport.core.console import guarded

#: The root of the repository.
ROOT = Path(__file__).resolve().parents[2]

Rng = np.random.Generator
Read = Callable[[], object]
T = TypeVar("T")

#: How many of twenty cases damage each kind of file.
KINDS = {"manifest": 6, "TOML": 4, "safetensors": 3, "ONNX": 2, "program": 2, "image": 3}
_ORDER = tuple(kind for kind, count in KINDS.items() for _ in range(count))

#: What one case may add to the peak memory of the process, in bytes; libraries take most of a gigabyte without a case.
MAX_ADDED_MEMORY = 2**29
#: Codes of the command line that a damaged file may end with.
_EXITS = (0, 1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A case: the name of what reads the file, and the call."""

    reader: str
    read: Read


def pick(rng: Rng, items: Sequence[T]) -> T:
    """One of ``items``."""
    return items[int(rng.integers(len(items)))]


def kind_of(index: int) -> str:
    """What case ``index`` damages: every twenty cases have each kind as often as ``KINDS`` says."""
    # 7 and 20 have no common divisor, so that a few cases already have all kinds.
    return _ORDER[(7 * index) % len(_ORDER)]


def run_case(prepared: Prepared) -> tuple[int, str]:
    """Exit code and stderr of a reader, as a command would end."""
    stdout, stderr = io.StringIO(), io.StringIO()
    exit_code = 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            guarded(prepared.read)
        except SystemExit as end:
            exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return exit_code, stderr.getvalue()


def judged(exit_code: int, stderr: str, outside: Sequence[str], added: int) -> str:
    """What is wrong with the end of a case; empty if nothing is."""
    if outside:
        return f"outside: {outside[0]}"
    if "KDX900" in stderr:
        return "KDX900"
    if "Traceback" in stderr:
        return "traceback"
    if exit_code not in _EXITS:
        return f"exit code {exit_code}"
    if added > MAX_ADDED_MEMORY:
        return f"memory: {added / 2**20:.0f} MiB more"
    return ""
