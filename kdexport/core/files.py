"""Atomic writes: a file or folder appears complete or not at all.

Each is written under another name in the same folder, and renamed when it is complete and on disk. These functions are
for everything that a user keeps or a later process reads. They are not needed inside a folder that itself appears by
rename (a stage's result, a bundle, a Triton model before ``publish``), or in a temporary folder.
"""

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from kdexport.errors import OutputError, StorageError

_PARTIAL = ".partial-"

#: Errors of the disk that a file is written to, of which the system names no file, or the one that was read.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class PlaceError(OSError):
    """An ``OSError`` whose ``filename`` is where something was to be written, as the user knows it."""


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Name ``place`` in errors of a full, read-only or failing disk that the block raises."""
    try:
        yield
    except PlaceError:
        raise
    except shutil.Error as error:
        # Copying a folder collects the errors of its files as texts.
        text = str(error.args[0][0][2]) if error.args and error.args[0] else str(error)
        found = re.match(r"\[Errno (\d+)\] ([^:]+)", text)
        raise PlaceError(int(found[1]) if found else errno.EIO, found[2] if found else text, str(place)) from error
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            raise PlaceError(error.errno, error.strerror, str(place)) from error
        raise


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A temporary folder that is removed at the end of the block, also if a signal stops the command."""
    with tempfile.TemporaryDirectory(prefix=f"kdexport-{purpose}-") as folder, writing(Path(folder)):
        yield Path(folder)


def require_writable_file(path: Path | None) -> None:
    """Raise ``OutputError`` if the report of a measurement could not be written to ``path`` afterwards."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise OutputError(
            f"{path} cannot be written: it is a folder, or its folder is missing or read-only.",
            remedy="Pass a file in an existing, writable folder; nothing was measured.",
        )


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; after a failure ``path`` is unchanged."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data``; after a failure ``path`` is unchanged."""
    write_file(path, lambda partial: partial.write_bytes(data))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write(partial)`` write a file that then replaces ``path``; after a failure ``path`` is unchanged."""
    # Processes that write the same file at once have different partial files.
    partial = path.with_name(f".{path.name}{_PARTIAL}{os.getpid()}")
    try:
        with writing(path):
            write(partial)
            _flush(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove the partial files of killed processes from ``folder``; no other process may be writing to it."""
    for partial in folder.glob(f".*{_PARTIAL}[0-9]*"):
        partial.unlink(missing_ok=True)


def publish(partial: Path, final: Path) -> None:
    """Rename a finished folder to ``final``; its files are flushed to disk first."""
    with writing(final):
        for path in partial.rglob("*"):
            if path.is_file():
                _flush(path)
        partial.rename(final)


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold ``lock`` against other processes; the system releases it when this process ends in any way.

    Raises ``StorageError`` on a system without such locks.
    """
    try:
        import fcntl
    except ImportError:
        raise StorageError(
            "kdexport runs on Linux and macOS: this system has no locks on folders (flock).",
            remedy="On Windows, run kdexport in WSL 2 or in a Linux container.",
        ) from None
    # A folder is locked itself: if a lock file were removed, two processes could hold two files of one name.
    descriptor = os.open(lock, os.O_RDONLY if lock.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write(f"Waiting for another kdexport process that holds {lock} ...\n")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def require_writable(folder: Path) -> None:
    """Create the parent of ``folder`` and test that it can be written; raises ``OSError`` if not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    probe = folder.parent / f".{folder.name}.probe-{os.getpid()}"
    probe.mkdir()
    probe.rmdir()


def require_replaceable(folder: Path, is_ours: Callable[[Path], bool]) -> None:
    """Raise ``OutputError`` if ``folder`` holds something else than kdexport wrote, as ``is_ours`` tells."""
    if not folder.name:
        raise OutputError(
            f"{folder} has no folder name and cannot be written.", remedy="Pass --out with the name of a new folder."
        )
    if folder.parent.is_dir():
        with exclusive(folder.parent):
            recover(folder)
    occupied = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if folder.is_symlink() or (occupied and not (folder.is_dir() and is_ours(folder))):
        raise OutputError(
            f"{folder} exists and is not a bundle.",
            remedy="Pass another --out, or move the folder away; nothing was changed.",
        )


def replace_folder(source: Path, target: Path) -> None:
    """Replace ``target`` with a copy of ``source`` when the copy is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(target.parent):
        write_folder(target, lambda incoming: shutil.copytree(source, incoming))


def write_folder(target: Path, make: Callable[[Path], object]) -> None:
    """Let ``make(incoming)`` fill a folder that then replaces ``target``.

    Only one process at a time may call this for one target: ``replace_folder`` locks; other callers own their folder.
    """
    incoming, outgoing = _sibling(target, "new"), _sibling(target, "old")
    shutil.rmtree(incoming, ignore_errors=True)
    try:
        with writing(target):
            make(incoming)
            if target.exists():
                target.rename(outgoing)
            publish(incoming, target)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
        recover(target)


def recover(target: Path) -> None:
    """Restore the old folder, or remove it, if ``write_folder`` was killed between its two renames."""
    outgoing = _sibling(target, "old")
    if outgoing.is_dir() and not target.exists():
        outgoing.rename(target)
    shutil.rmtree(outgoing, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.kdexport-{kind}")
