"""Files and folders that appear whole or not at all: whatever is written for a user, or read again later.

A file or folder is made under a name beside its own and renamed when it is complete and on disk. What is written inside
a folder that appears by rename itself (a stage's result, a bundle, a Triton model before ``publish``), or in a
temporary folder, is written plainly.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from kdexport.errors import OutputError, StorageError

_PARTIAL = ".partial-"


def require_writable_file(path: Path | None) -> None:
    """Raise ``OutputError`` before anything is timed where a report could not be written after it."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise OutputError(
            f"{path} cannot be written: it is a folder, or its folder is missing or read-only.",
            remedy="Pass a file in a folder that exists; nothing was timed.",
        )


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; ``path`` is complete, or what it was before."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data``; ``path`` is complete, or what it was before."""
    write_file(path, lambda partial: partial.write_bytes(data))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write(partial)`` make a file that then takes the place of ``path``; a failure leaves ``path`` as it was."""
    # Two processes that write one file have a partial file each.
    partial = path.with_name(f".{path.name}{_PARTIAL}{os.getpid()}")
    try:
        write(partial)
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left unfinished in ``folder``, which no other process may be writing to."""
    for partial in folder.glob(f".*{_PARTIAL}[0-9]*"):
        partial.unlink(missing_ok=True)


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name; its files are on disk before the name is."""
    for path in partial.rglob("*"):
        if path.is_file():
            _flush(path)
    partial.rename(final)


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold ``lock`` against other processes; the system drops it when this one ends, however it ends.

    Raises ``StorageError`` on a system without such locks.
    """
    try:
        import fcntl
    except ImportError:
        raise StorageError(
            "kdexport runs on Linux and macOS: this system has no locks on folders (flock).",
            remedy="On Windows, run kdexport in WSL 2 or in a Linux container.",
        ) from None
    # A folder is locked as it is: a lock file that is removed again would let two processes hold two of one name.
    descriptor = os.open(lock, os.O_RDONLY if lock.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write("Waiting for another kdexport that is working on the same thing ...\n")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def require_writable(folder: Path) -> None:
    """Create the parent of ``folder`` and prove that it can be written; ``OSError`` where it cannot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    probe = folder.parent / f".{folder.name}.probe-{os.getpid()}"
    probe.mkdir()
    probe.rmdir()


def require_replaceable(folder: Path, is_ours: Callable[[Path], bool]) -> None:
    """Raise ``OutputError`` where ``folder`` holds something that is not ours to replace."""
    if not folder.name:
        raise OutputError(f"{folder} cannot be a bundle folder.", remedy="Pass --out with a name of its own.")
    if folder.parent.is_dir():
        with exclusive(folder.parent):
            recover(folder)
    occupied = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if folder.is_symlink() or (occupied and not (folder.is_dir() and is_ours(folder))):
        raise OutputError(
            f"{folder} exists and is not a bundle.", remedy="Pass another --out, or move it away; nothing was changed."
        )


def replace_folder(source: Path, target: Path) -> None:
    """Put a copy of ``source`` in the place of ``target``, which stays as it is until the copy is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(target.parent):
        write_folder(target, lambda incoming: shutil.copytree(source, incoming))


def write_folder(target: Path, make: Callable[[Path], object]) -> None:
    """Let ``make(incoming)`` make a folder that then takes the place of ``target``.

    Only one process at a time may do so: ``replace_folder`` locks, a run has its folder to itself.
    """
    incoming, outgoing = _sibling(target, "new"), _sibling(target, "old")
    shutil.rmtree(incoming, ignore_errors=True)
    try:
        make(incoming)
        if target.exists():
            target.rename(outgoing)
        publish(incoming, target)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
        recover(target)


def recover(target: Path) -> None:
    """After a kill between the two renames of ``write_folder``: put the old folder back, or drop it."""
    outgoing = _sibling(target, "old")
    if outgoing.is_dir() and not target.exists():
        outgoing.rename(target)
    shutil.rmtree(outgoing, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.kdexport-{kind}")
