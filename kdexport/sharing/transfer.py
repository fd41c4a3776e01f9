"""Sends a bundle to a place, and fetches one: whole, and with the digests of its manifest, or not at all."""

import errno
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from kdexport.bundle.layout import SIGNATURE
from kdexport.bundle.manifest import MANIFEST, Manifest, read_manifest
from kdexport.bundle.signature import Signer, require_signed
from kdexport.bundle.slim_form import require_regular, require_sound
from kdexport.core.digests import sha256_file
from kdexport.core.extras import missing_package
from kdexport.core.files import replace_folder, require_replaceable, require_writable, scratch_folder
from kdexport.errors import BundleError, KdexportError, TransferError, first_line
from kdexport.sharing.places import Place, without_secrets

Progress = Callable[[str], None]
T = TypeVar("T")

#: Errors of the disk. Those of a connection are of the same class, without these numbers.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@dataclass(frozen=True, kw_only=True, slots=True)
class SentFile:
    """A file of a bundle: its path in it, its size in bytes, its sha256."""

    name: str
    bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def files_to_send(folder: Path) -> tuple[SentFile, ...]:
    """The files of a verified bundle, manifest last.

    Raises ``BundleError`` for a bundle whose checks did not hold or that has links, ``VerificationError`` if a file
    has changed.
    """
    manifest = read_manifest(folder)
    require_sound(folder, manifest)
    digests = dict(sorted(manifest.files.items()))
    for name in (SIGNATURE, MANIFEST):
        if (folder / name).is_file():
            digests[name] = sha256_file(folder / name)
    return tuple(
        SentFile(name=name, bytes=(folder / name).stat().st_size, sha256=digest) for name, digest in digests.items()
    )


def push(folder: Path, place: Place, files: tuple[SentFile, ...], *, private: bool, progress: Progress) -> str:
    """Send ``files`` of the bundle ``folder``; where they are now. Raises ``TransferError``."""
    progress(f"{len(files)} files to {place}")
    if place.kind == "hf":
        from kdexport.sharing.hugging_face import upload

        return _explained(place, lambda: upload(folder, place.name, private=private))
    from kdexport.sharing.oci_registry import send

    return _explained(place, lambda: send(folder, place, [file.name for file in files]))


def pull(place: Place, out: Path, *, trusted: Path | None, progress: Progress) -> tuple[Manifest, Signer | None]:
    """Fetch a bundle to ``out``; who signed it, if ``trusted`` has the key or certificate to check that.

    Raises ``TransferError`` if it cannot be fetched, ``BundleError``, ``VerificationError`` or ``SignatureError`` for
    what is not a bundle, has other files than its manifest, or another signature; ``out`` is unchanged then.
    """
    require_replaceable(out, _is_bundle)
    require_writable(out)
    with scratch_folder("pull") as scratch:
        folder = scratch / "bundle"
        folder.mkdir()
        progress(f"fetching {place}")
        if place.kind == "hf":
            from kdexport.sharing.hugging_face import download

            _explained(place, lambda: download(place.name, place.version, folder))
        else:
            from kdexport.sharing.oci_registry import fetch

            _explained(place, lambda: fetch(place, folder))
        progress("checking the files")
        signer = None if trusted is None else require_signed(folder, trusted)
        manifest = read_manifest(folder)
        require_regular(folder)
        require_sound(folder, manifest)
        replace_folder(folder, out)
    return manifest, signer


def _explained(place: Place, run: Callable[[], T]) -> T:
    """Run a library's transfer; its errors become ours, without tokens."""
    try:
        return run()
    except KdexportError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        missing = missing_package(error)
        if missing is not None:
            raise missing from None
        reason = without_secrets(f"{type(error).__name__}: {first_line(error)}")
    # Not from the error of the library: its requests, which --debug would print, may hold a token.
    raise TransferError(
        f"{place} could not be used: {reason}",
        remedy="Check the name, the network and your access: hf auth login for the Hub, docker login HOST for a "
        "registry.",
    )


def _is_bundle(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except BundleError:
        return False
    return True
