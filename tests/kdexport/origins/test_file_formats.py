"""Files that are not weights, told from their content."""

import os
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdexport.errors import CheckpointError
from kdexport.origins.file_formats import weight_format


def write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def zipped(name: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"content")

    return make


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "weights.pth")


def scripted(path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(path))  # type: ignore[no-untyped-call]


def exported(path: Path) -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, path.with_suffix(".pt2"))
    path.with_suffix(".pt2").rename(path)


def folder(*names: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.mkdir()
        for name in names:
            (path / name).touch()

    return make


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n"
FILES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "lfs": (write(LFS), "is a pointer of Git LFS", "git lfs pull"),
    "annex": (write(b"/annex/objects/SHA256E-s3--abc.pt\n"), "is a pointer of git-annex", "git annex get"),
    "page": (write(b"\xef\xbb\xbf\n <!DOCTYPE HTML><html>"), "is a web page", "Download the file itself"),
    "old page": (write(b"<html lang=de>"), "is a web page", "Download the file itself"),
    "xml": (write(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>"), "is an XML answer", "again"),
    "index": (write(b'{\n  "metadata": {"total_size": 3}, "weight_map": {}}'), "split into several", "one file"),
    "json": (write(b'{"error": "Not Found"}'), "is a JSON text", "state_dict"),
    "empty": (write(b""), "is empty (0 bytes)", "again"),
    "onnx": (write(b"\x08\x08\x12\x07pytorch\x1a"), "is an ONNX or TensorFlow model", "state_dict"),
    "hdf5": (write(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file", "state_dict"),
    "gguf": (write(b"GGUF\x03\x00"), "is a GGUF file", "state_dict"),
    "tflite": (write(b"\x1c\0\0\0TFL3"), "is a TensorFlow Lite model", "state_dict"),
    "gzip": (write(b"\x1f\x8b\x08\x00"), "is a compressed archive", "Extract it"),
    "tar": (tarred, "is a tar archive", "Extract it"),
    "array": (lambda path: np.save(path.open("wb"), np.ones(3)), "is an array of NumPy", "state_dict"),
    "arrays": (lambda path: np.savez(path.open("wb"), a=np.ones(3)), "is an archive of NumPy arrays", "state_dict"),
    "keras": (zipped("model.weights.h5"), "is a Keras model", "state_dict"),
    "zip in zip": (zipped("inner/best.pth"), "is a zip archive that contains 'inner/best.pth'", "Extract it"),
    "other zip": (zipped("readme.txt"), "is a zip archive, but not one of torch.save", "state_dict"),
    "half a zip": (write(b"PK\x03\x04" + bytes(50)), "is truncated: it has 54 bytes", "again"),
    "script": (scripted, "is a TorchScript archive, which contains code", "torch.jit.load"),
    "program": (exported, "is a program of torch.export.save", "kdexport fuse"),
    "zeros": (write(bytes(300)), "its 300 bytes begin with 00 00", "state_dict"),
    "folder": (folder("a.txt"), "is a folder and holds no file of weights", "file"),
    "folder of weights": (folder("b.bin", "model.safetensors"), "is a folder, not a file", "b.bin"),
    "distributed": (folder(".metadata", "__0_0.distcp"), "of torch.distributed.checkpoint", "dcp_to_torch"),
    "unpacked": (folder("data.pkl", "version"), "is an unpacked archive of torch.save", "file"),
    "gone": (lambda path: None, "There is no file", "Pass the path"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", FILES)
def test_another_file_is_named_with_what_to_do(kind: str, tmp_path: Path) -> None:
    make, fact, remedy = FILES[kind]
    path = tmp_path / "weights.pt"
    make(path)
    with pytest.raises(CheckpointError) as caught:
        weight_format(path)
    assert fact in caught.value.message
    assert str(path) in caught.value.message
    assert remedy in caught.value.remedy


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in folders")
def test_a_named_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        weight_format(tmp_path / "pipe.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.onnx", "w"])
def test_weights_are_told_from_their_content(name: str, tmp_path: Path) -> None:
    path, tensors = tmp_path / name, {"a": torch.ones(2)}
    save_file(tensors, path)
    assert weight_format(path) == "safetensors"
    torch.save(tensors, path)
    assert weight_format(path) == "pickle"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert weight_format(path) == "pickle"
