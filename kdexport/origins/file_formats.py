"""The format of a file that should hold weights, told from its content, and the reasons to refuse other files."""

import re
import zipfile
from pathlib import Path
from typing import Literal

from kdexport.errors import CheckpointError

Format = Literal["safetensors", "pickle"]

_HEAD = 512
_ZIP, _PICKLE = b"PK\x03\x04", re.compile(rb"\x80[\x00-\x05]")
#: The longest header that the safetensors format allows, in bytes.
_LONGEST_HEADER = 100_000_000
_AGAIN = "Copy or download the file again."
_STATE_DICT = "Pass a file with model.state_dict(), saved by torch.save or as safetensors."
_EXTRACT = "Extract it, and pass the file of weights that is in it."

# How a file begins (after white space for texts), what it is then, and what to do.
_TEXTS = (
    (
        rb"version https://git-lfs",
        "is a pointer of Git LFS, not the weights",
        "Run git lfs pull in the folder of the file, or download the file itself.",
    ),
    (rb"\S*\.?git/annex/|/annex/objects/", "is a pointer of git-annex, not the weights", "Run git annex get FILE."),
    (
        rb"<!doctype html|<html|<head|<script",
        "is a web page, not weights: the address led to a page, for example to a login",
        "Download the file itself; its download address often ends in resolve/... or has ?download=true.",
    ),
    (rb"<\?xml|<error", "is an XML answer of a server, often an error message, not weights", _AGAIN),
    (
        rb"\{\s*\"(weight_map|metadata)\"",
        "is the index of weights that are split into several files",
        "Load these files into one model, and save its state_dict as one file.",
    ),
    (rb"[\[{]\s*[\"\[{\]}]", "is a JSON text, not weights", _STATE_DICT),
)
_BINARIES = (
    (rb"\x89HDF\r\n", "is an HDF5 file, as Keras writes it", _STATE_DICT),
    (rb"GGUF", "is a GGUF file of quantized weights", _STATE_DICT),
    (rb"....TFL3", "is a TensorFlow Lite model", _STATE_DICT),
    (rb"\x93NUMPY", "is an array of NumPy, not named tensors", _STATE_DICT),
    (rb"\x08[\x01-\x20]\x12[\x01-\x40][\w.-]", "is an ONNX or TensorFlow model", _STATE_DICT),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "is a compressed archive", _EXTRACT),
    (rb"(?s:.{257})ustar", "is a tar archive, although torch.save writes none since version 0.2", _EXTRACT),
)


def weight_format(path: Path) -> Format:
    """The format of ``path``, whatever its name ends in.

    Raises ``CheckpointError`` if there is no such file, or if it is neither safetensors nor written by ``torch.save``.
    """
    if path.is_dir():
        raise _folder(path)
    if not path.is_file():
        raise CheckpointError(
            f"There is no file {path}." if not path.exists() else f"{path} is not a regular file.",
            remedy="Pass the path of a file of weights (.safetensors, or .pt and .pth with tensors only).",
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}.", remedy="Check the permissions and the disk."
        ) from error
    if not size:
        raise CheckpointError(f"{path} is empty (0 bytes).", remedy=_AGAIN)
    if _is_safetensors(head):
        return "safetensors"
    if head.startswith(_ZIP):
        _require_torch_archive(path)
        return "pickle"
    if _PICKLE.match(head):
        return "pickle"
    raise _other(path, head, size)


def _is_safetensors(head: bytes) -> bool:
    # The length of the header in 8 bytes, then the header, which is a JSON object.
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _LONGEST_HEADER


def _folder(path: Path) -> CheckpointError:
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError:
        names = []
    if ".metadata" in names:
        return CheckpointError(
            f"{path} is a folder of torch.distributed.checkpoint, not a file.",
            remedy=f"Convert it to one file: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} "
            "weights.pt",
        )
    inside = [name for name in names if Path(name).suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin")]
    if inside:
        return CheckpointError(
            f"{path} is a folder, not a file of weights.", remedy=f"Pass a file in it, for example {path / inside[0]}."
        )
    if names == ["data", "data.pkl", "version"] or {"data.pkl", "version"} <= set(names):
        return CheckpointError(
            f"{path} is an unpacked archive of torch.save, not a file of weights.", remedy="Pass the file before it."
        )
    return CheckpointError(f"{path} is a folder and holds no file of weights.", remedy="Pass a file of weights.")


def _require_torch_archive(path: Path) -> None:
    """Raise ``CheckpointError`` if the zip archive ``path`` was not written by ``torch.save``."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is truncated: it has {path.stat().st_size} bytes, and the table at its end is missing or damaged.",
            remedy=_AGAIN,
        ) from error
    problem = _other_archive(names)
    if problem is not None:
        raise CheckpointError(f"{path} {problem[0]}.", remedy=problem[1])


def _other_archive(names: list[str]) -> tuple[str, str] | None:
    """What an archive with these entries is instead of one of ``torch.save``, and what to do; None if it is one."""
    inner = {name.partition("/")[2] for name in names}
    if any(name.startswith("code/") for name in inner) or "constants.pkl" in inner or "model.json" in inner:
        return (
            "is a TorchScript archive, which contains code",
            "Save only its weights where you trust it: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')",
        )
    exported = ("archive_format", "serialized_exported_program.json", "models/model.json")
    if any(name.endswith(exported) for name in names):
        return (
            "is a program of torch.export.save, not a file of weights",
            "Save model.state_dict() with torch.save; kdexport fuse reads such programs.",
        )
    if "data.pkl" in inner:
        return None
    if any(name.endswith(".npy") for name in names):
        return "is an archive of NumPy arrays", _STATE_DICT
    if any(name.endswith((".weights.h5", "config.json")) for name in names):
        return "is a Keras model", _STATE_DICT
    weights = [name for name in names if name.endswith((".pt", ".pth", ".ckpt", ".safetensors", ".bin"))]
    if weights:
        return f"is a zip archive that contains {weights[0][:80]!r}", _EXTRACT
    return "is a zip archive, but not one of torch.save", _STATE_DICT


def _other(path: Path, head: bytes, size: int) -> CheckpointError:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, what, remedy in _TEXTS:
        if re.match(pattern, text, re.IGNORECASE):
            return CheckpointError(f"{path} {what}.", remedy=remedy)
    for pattern, what, remedy in _BINARIES:
        if re.match(pattern, head, re.DOTALL):
            return CheckpointError(f"{path} {what}.", remedy=remedy)
    if path.suffix == ".onnx":
        return CheckpointError(f"{path} is an ONNX model, not a file of weights.", remedy=_STATE_DICT)
    begins = head[:16].hex(" ")
    return CheckpointError(
        f"{path} is truncated, or neither a safetensors file nor one of torch.save: its {size} bytes begin with "
        f"{begins}.",
        remedy=_STATE_DICT,
    )


def unreadable_tensors(path: Path, error: Exception) -> CheckpointError:
    """Why safetensors could not read ``path``; it opens only files whose path is text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return CheckpointError(
            f"The path {str(path)!a} is not text in UTF-8, so that safetensors cannot open it.",
            remedy="Rename the file or its folder.",
        )
    return CheckpointError(
        f"{path} is truncated or not a safetensors file: {error}.", remedy="Copy or download the file again."
    )
