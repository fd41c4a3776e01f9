"""A .pt2 file is read only if reading it runs nothing of it."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdexport.errors import CheckpointError
from kdexport.origins.program_archive import _GUARD, _is_harmless, open_archive, require_archive


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "net.pt2"
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval()
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    torch.export.save(torch.export.export(net, (torch.zeros(2, 3, 5, 5),), dynamic_shapes=shapes), path)
    return path


class Runs:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def changed(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of an archive with other content; a file for which ``change`` returns None is left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def pickled_inputs(name: str, content: bytes) -> bytes:
    if not name.startswith("data/sample_inputs/"):
        return content
    stream = io.BytesIO()
    torch.save(Runs(), stream)
    return stream.getvalue()


def in_config(**changes: Any) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("_config.json") or not name.startswith("data/weights/"):
            return content
        data = json.loads(content)
        for entry in data["config"].values():
            entry.update(changes)
        return json.dumps(data).encode()

    return change


def in_model(old: str, new: str) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if not name.startswith("models/"):
            return content
        assert old in content.decode()
        return content.decode().replace(old, new).encode()

    return change


def test_a_plain_archive_opens_and_computes(plain: Path) -> None:
    with torch.no_grad():
        assert open_archive(plain).module()(torch.zeros(3, 3, 5, 5)).shape == (3, 36)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (pickled_inputs, "holds more than tensors"),
        (in_config(use_pickle=True), "as a pickle"),
        (in_config(path_name="../../outside"), "as a pickle"),
        (in_model("torch.ops.aten.relu.default", "os.system"), "calls 'os.system'"),
        (in_model("torch.ops.aten.relu.default", "torch.ops.aten.relu.default()"), "calls"),
    ],
)
def test_an_archive_that_could_run_something_is_refused_and_runs_nothing(
    change: Callable[[str, bytes], bytes | None], words: str, plain: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = changed(plain, tmp_path / "evil.pt2", change)
    with pytest.raises(CheckpointError, match="is refused") as refused:
        open_archive(path)
    assert words in refused.value.message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text", ["__import__('os').mkdir('ran')", "exec('import os')", "(lambda: 1)()", "s77.__class__", "[x for x in y]"]
)
def test_a_size_that_is_more_than_an_expression_is_refused(
    text: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def change(name: str, content: bytes) -> bytes:
        if not name.startswith("models/"):
            return content

        def replaced(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: text if key == "expr_str" else replaced(item) for key, item in value.items()}
            return [replaced(item) for item in value] if isinstance(value, list) else value

        data = replaced(json.loads(content))
        assert json.dumps(text) in json.dumps(data)
        return json.dumps(data).encode()

    with pytest.raises(CheckpointError, match="not a plain expression"):
        open_archive(changed(plain, tmp_path / "evil.pt2", change))
    assert not (tmp_path / "ran").exists()


def without_models(name: str, content: bytes) -> bytes | None:
    return None if name.startswith("models/") else content


@pytest.mark.parametrize("kind", ["truncated", "no models", "pickle", "weights", "missing", "onnx", "safetensors"])
def test_what_is_no_archive_is_named(kind: str, plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    words = "not a complete archive"
    if kind == "truncated":
        path.write_bytes(plain.read_bytes()[:3000])
    elif kind == "no models":
        changed(plain, path, without_models)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Runs()))
    elif kind == "weights":
        path = tmp_path / "net.pth"
        torch.save({"a": torch.zeros(1)}, path)
        words = "holds weights and no program"
    elif kind in ("onnx", "safetensors"):
        path = tmp_path / f"net.{kind}"
        path.write_bytes(b"x")
        words = "ONNX" if kind == "onnx" else "weights"
    else:
        words = "There is no file"
    with pytest.raises(CheckpointError, match=words) as refused:
        open_archive(path)
    assert refused.value.remedy
    if kind == "missing":
        with pytest.raises(CheckpointError):
            require_archive(path)


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b'{"config": []}', b'{"config": {"w": 1}}', b'{"config": {"w": {}}}']
)
def test_a_list_of_tensors_of_another_form_is_refused(plain: Path, tmp_path: Path, content: bytes) -> None:
    def other(name: str, old: bytes) -> bytes:
        return content if name.startswith("data/weights/") and name.endswith("_config.json") else old

    path = changed(plain, tmp_path / "net.pt2", other)
    with pytest.raises(CheckpointError, match=r"not a complete archive .*_config\.json is not a list of tensors"):
        open_archive(path)


@pytest.mark.parametrize(
    "guard",
    [
        "L['input'].size()[0] >= 2",
        # torch 2.11 writes the sizes that a convolution needs so.
        "(max(1, (-2) + L['input'].size()[2])*max(1, (-2) + L['input'].size()[3])) != 1",
        "min(L['x'].size()[0], 4) < 5",
    ],
)
def test_comparisons_of_sizes_are_harmless(guard: str) -> None:
    assert _is_harmless(guard, _GUARD)


@pytest.mark.parametrize(
    "guard",
    [
        "__import__('os').system('true') == 0",
        "max.__self__.open('x') != 1",
        "max(open('x'), 1) != 1",
        "(lambda: 1)() == 1",
        "L['__class__'] == 1",
        "min([x for x in L]) == 1",
        "max(1, 2",
    ],
)
def test_other_guards_are_not(guard: str) -> None:
    assert not _is_harmless(guard, _GUARD)
