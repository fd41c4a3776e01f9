"""`kdexport fuse` as a user types it: outputs, agreement with the original, and every kind of bad input."""

import functools
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from kdexport.backends.ort import import_onnxruntime
from kdexport.graph.audit import operator_counts
from kdexport.reparam import compose, dataflow
from tests.conftest import Command, Outcome
from tests.kdexport.hostile_values import relative_difference
from tests.kdexport.reparam.foreign_blocks import Diverse, MobileOne, RepVgg, ready, whole_net

Fuse = Callable[..., Outcome]
FACTORIES = """
import torch
from torch import nn
from tests.kdexport.reparam.foreign_blocks import Forward, MobileOne, RepVgg, ready, whole_net

net = nn.Conv2d(3, 4, 1)
number = 3
def good(): return ready(whole_net([RepVgg(3, 6, 2), MobileOne(6, 6, 3, 2, groups=6)], 6), dtype=torch.float32)
def plain(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
def training(): return RepVgg(3, 6)
def bfloat16(): return plain().bfloat16()
def number_out(): return Forward(lambda m, x: (m.net(x), 3), net=plain()).eval()
def size_out(): return Forward(lambda m, x: (m.net(x), x.shape[0]), net=plain()).eval()
def choosing(): return Forward(lambda m, x: m.net(x) if x.sum() > 0 else x, net=plain()).eval()
def special(): return Forward(lambda m, x: torch.special.bessel_j0(m.net(x)), net=plain()).eval()
def raising(): raise ValueError("no luck\\nat all")
def leaving(): raise SystemExit(7)
def asking(size): return nn.Conv2d(3, size, 1)
def wrong(): return "a string"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with modules that define factories; they are unloaded after the test."""
    (tmp_path / "shelf.py").write_text(FACTORIES)
    (tmp_path / "broken_shelf.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("shelf", "broken_shelf", "net"):
        sys.modules.pop(name, None)


@pytest.fixture
def fuse(here: Command) -> Fuse:
    """``kdexport fuse ...`` in this process."""
    return functools.partial(here, "fuse")


def save(net: nn.Module, path: Path, shape: tuple[int, ...], *, dynamic: bool = True) -> Path:
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    torch.export.save(torch.export.export(net, (torch.randn(shape),), dynamic_shapes=shapes), path)
    return path


def small_net() -> nn.Module:
    net = whole_net([Diverse(3, 6, border="before"), MobileOne(6, 8, 1, 2), RepVgg(8, 8, groups=2)], 8)
    return ready(net, dtype=torch.float32)


def run_onnx(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = import_onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(np.asarray(found))


def test_a_program_becomes_a_smaller_program_and_an_onnx_file_that_compute_the_same(folder: Path, fuse: Fuse) -> None:
    net = small_net()
    save(net, folder / "net.pt2", (2, 3, 13, 10))
    done = fuse("net.pt2", "--out", "fused", "--json")
    assert done.exit_code == 0, done.stderr
    assert done.data == {"out": "fused", **json.loads((folder / "fused/certificate.json").read_text())}
    assert [block["name"] for block in done.data["certificate"]["blocks"]] == ["0", "1.convs", "2"]
    assert done.data["certificate"]["whole_relative_error"] < 1e-12
    assert done.data["after"]["multiply_accumulates"] < done.data["before"]["multiply_accumulates"]
    model = onnx.load(folder / "fused" / "model.onnx")
    counts = operator_counts(model)
    assert counts["Conv"] == 3
    assert not {"BatchNormalization", "AveragePool", "Add"} & counts.keys()
    program = torch.export.load(folder / "fused" / "fused.pt2").module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 13, 10, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            wanted = net(x)
            assert relative_difference(program(x), wanted) < 1e-5
            assert relative_difference(run_onnx(folder / "fused" / "model.onnx", x), wanted) < 1e-5
    marks = (b"site-packages", b"/home/", b"/root/", b"/Users/", str(folder).encode(), b"tests/kdexport")
    for path in (folder / "fused").iterdir():
        assert not [mark for mark in marks if mark in path.read_bytes()], path.name

    again = fuse("fused/fused.pt2", "--out", "twice")
    assert again.exit_code == 0
    assert "Nothing to merge" in again.stdout


def test_a_factory_is_fused_and_the_table_lists_the_merges(folder: Path, fuse: Fuse) -> None:
    done = fuse("shelf:good", "--input", "1,3,17,15", "--out", "out/fused")
    assert done.exit_code == 0, done.stderr
    assert re.search(r"^0 +2 branches: 2 convolutions \+ 2 batch norms +\d\.\de-1[5-7]", done.stdout, re.MULTILINE)
    assert re.search(r"^1 +4 branches: 3 convolutions \+ 4 batch norms", done.stdout, re.MULTILINE)
    assert re.search(r"^multiply-accumulates +[\d,]+ +[\d,]+", done.stdout, re.MULTILINE)
    assert "Verdict: the whole differs by" in done.stdout
    assert sorted(path.name for path in (folder / "out" / "fused").iterdir()) == [
        "certificate.json", "fused.pt2", "model.onnx",
    ]  # fmt: skip
    model = onnx.load(folder / "out" / "fused" / "model.onnx")
    assert [item.name for item in (*model.graph.input, *model.graph.output)] == ["input", "logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    # An earlier output of the command is replaced, and a module with nothing to merge is not an error.
    plain = fuse("shelf:plain", "--input", "2,3,9,9", "--out", "out/fused")
    assert plain.exit_code == 0
    assert "Nothing to merge" in plain.stdout
    assert json.loads((folder / "out" / "fused" / "certificate.json").read_text())["certificate"]["blocks"] == []


@pytest.mark.parametrize(
    "dynamic",
    [
        {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},
        {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},
        {0: torch.export.Dim("batch", min=1), 2: 2 * torch.export.Dim("half", min=4, max=50)},
        {0: torch.export.Dim("batch", min=2, max=6)},
    ],
    ids=["automatic", "dynamic", "even", "bounded"],
)
def test_sizes_stay_dynamic_however_they_were_declared(dynamic: dict[int, Any], folder: Path, fuse: Fuse) -> None:
    net = ready(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), dtype=torch.float32)
    program = torch.export.export(net, (torch.randn(2, 3, 16, 15),), dynamic_shapes=(dynamic,))
    torch.export.save(program, folder / "net.pt2")
    done = fuse("net.pt2", "--out", "fused")
    assert done.exit_code == 0, done.stderr
    sizes = onnx.load(folder / "fused" / "model.onnx").graph.input[0].type.tensor_type.shape.dim
    assert {axis for axis, size in enumerate(sizes) if size.dim_param} == set(dynamic)
    x = torch.randn(4, 3, 20 if 2 in dynamic else 16, 17 if 3 in dynamic else 15)
    with torch.no_grad():
        assert relative_difference(run_onnx(folder / "fused" / "model.onnx", x), net(x)) < 1e-5


def test_a_fixed_batch_stays_fixed(folder: Path, fuse: Fuse) -> None:
    save(small_net(), folder / "net.pt2", (3, 3, 8, 9), dynamic=False)
    assert fuse("net.pt2", "--out", "fused").exit_code == 0
    model = onnx.load(folder / "fused" / "model.onnx")
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [3, 3, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.pt2"], "KDX200", "There is no file missing.pt2"),
        (["garbage.pt2"], "KDX200", "not a complete archive"),
        (["empty.pt2"], "KDX200", "not a complete archive"),
        (["other.pt2"], "KDX200", "no models/"),
        (["."], "KDX200", "There is no file"),
        (["shelf:good"], "KDX100", "without the shape"),
        (["shelf:good", "--input", "1,3,x"], "KDX100", "'1,3,x' is not a valid shape"),
        (["shelf:good", "--input", "0,3,9,9"], "KDX100", "not a valid shape"),
        (["shelf:good", "--input", "1,4,17,15"], "KDX300", "(2, 4, 17, 15)"),
        (["shelf:good", "--input", "1,3,17,15", "--input", "1,3,17,15"], "KDX300", "cannot be run on inputs"),
        (["shelf:goood", "--input", "1,3,9,9"], "KDX101", "good"),
        (["no_such_shelf:good", "--input", "1,3,9,9"], "KDX100", "cannot be imported"),
        (["broken_shelf:good", "--input", "1,3,9,9"], "KDX100", "nothing_of_this_name"),
        (["shelf:raising", "--input", "1,3,9,9"], "KDX100", "ValueError: no luck"),
        (["shelf:leaving", "--input", "1,3,9,9"], "KDX100", "SystemExit"),
        (["shelf:asking", "--input", "1,3,9,9"], "KDX100", "'size'"),
        (["shelf:wrong", "--input", "1,3,9,9"], "KDX100", "returned a str"),
        (["shelf:number", "--input", "1,3,9,9"], "KDX100", "is a int, not a factory"),
        (["shelf:net", "--input", "1,3,9,9"], "KDX100", "is a Conv2d, not a factory"),
        (["shelf:training", "--input", "1,3,9,9"], "KDX300", "a factory returns module.eval()"),
        (["shelf:bfloat16", "--input", "1,3,9,9"], "KDX100", "opset 20 of ONNX has no bfloat16 convolution"),
        (["shelf:number_out", "--input", "1,3,9,9"], "KDX100", "Output 1 of the program is 3 (int); an ONNX file can"),
        (["shelf:size_out", "--input", "1,3,9,9"], "KDX100", "Output 1 of the program is a size; an ONNX file can"),
        (["shelf:choosing", "--input", "1,3,9,9"], "KDX300", "cannot be exported"),
        (["shelf:special", "--input", "1,3,9,9"], "KDX310", "No ONNX function found for <OpOverload(op='prims.bessel"),
        (["weights.pth"], "KDX200", "holds weights and no program"),
        (["old.pth"], "KDX200", "holds weights and no program"),
        (["net.safetensors"], "KDX200", "holds weights and no program"),
        (["net.onnx", "--input", "1,3,9,9"], "KDX200", "is an ONNX file, and fuse merges PyTorch programs"),
        (["scripted.pt"], "KDX200", "is a TorchScript file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error_and_leaves_nothing_behind(
    arguments: list[str], code: str, words: str, folder: Path, fuse: Fuse
) -> None:
    (folder / "garbage.pt2").write_bytes(b"PK\x03\x04" + bytes(range(256)) * 4)
    (folder / "empty.pt2").touch()
    with zipfile.ZipFile(folder / "other.pt2", "w") as archive:
        archive.writestr("a/b.txt", "c")
    torch.save(nn.Conv2d(3, 4, 1).state_dict(), folder / "weights.pth")
    torch.save({"x": torch.ones(2)}, folder / "old.pth", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(folder / "scripted.pt", "w") as archive:
        archive.writestr("net/data.pkl", "")
        archive.writestr("net/code/__torch__.py", "")
    for name in ("net.onnx", "net.safetensors"):
        (folder / name).write_bytes(b"\x08\x07")
    before = sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
    done = fuse(*arguments, "--out", "fused")
    assert done.exit_code == (1 if code == "KDX310" else 2)
    assert done.stderr.startswith(f"error {code}: ")
    assert words in done.stderr
    assert not re.search(r"Traceback|\x1b|def forward", done.stderr)
    assert 2 <= len(done.stderr.strip().splitlines()) <= 4
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "net.pt2"
    return save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), path, (2, 3, 6, 7))


class WritesOnUnpickling:
    """Unpickling it writes a file."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def pickled() -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save((WritesOnUnpickling(),), buffer)
    return buffer.getvalue()


def edit_json(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        data = json.loads(content)
        change(data)
        return json.dumps(data).encode()

    return edit


def first_size(data: Any) -> None:
    """Put code where a symbolic size is read."""
    text = json.dumps(data)
    assert "Symbol(" in text
    start = text.index("Symbol('")
    end = text.index(")", start) + 1
    data.clear()
    data.update(json.loads(text.replace(text[start:end], "__import__('pathlib').Path('executed').touch()")))


def set_first_target(data: Any) -> None:
    data["graph_module"]["graph"]["nodes"][0]["target"] = "torch.serialization.os.system"


def set_guard(data: Any) -> None:
    data["guards_code"] = ["__import__('pathlib').Path('executed').touch() is None"]


def mark_pickled(data: Any) -> None:
    next(iter(data["config"].values()))["use_pickle"] = True


HOSTILE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "a pickled weight": ("data/weights/model_weights_config.json", edit_json(mark_pickled), "as a pickle"),
    "pickled example inputs": ("data/sample_inputs/model.pt", lambda _: pickled(), "more than tensors"),
    "code for a size": ("models/model.json", edit_json(first_size), "not a plain expression"),
    "code for a guard": ("models/model.json", edit_json(set_guard), "not a plain comparison"),
    "a call that is no operator": ("models/model.json", edit_json(set_first_target), "torch.serialization.os.system"),
    "weights of an old format": ("data/weights/model.pt", lambda _: pickled(), "a pickle of an old format"),
    "compiled code": ("data/aotinductor/model/model.so", lambda _: b"\x7fELF", "compiled code"),
    "no JSON": ("models/model.json", lambda _: b"{", "not a complete archive"),
    "another program": ("models/model.json", lambda _: b"{}", "cannot be read by torch"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_archive_that_would_run_code_is_refused_before_the_code_runs(
    name: str, archive: Path, folder: Path, fuse: Fuse
) -> None:
    place, change, words = HOSTILE[name]
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(folder / "hostile.pt2", "w") as target:
        root = source.namelist()[0].partition("/")[0]
        entries = {item: source.read(item) for item in source.namelist()}
        entries[f"{root}/{place}"] = change(entries.get(f"{root}/{place}", b""))
        for item, content in entries.items():
            target.writestr(item, content)
    done = fuse("hostile.pt2", "--out", "fused")
    assert done.exit_code == 2
    assert done.stderr.startswith("error KDX200: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "executed").exists()
    assert not (folder / "fused").exists()


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.999])
def test_a_truncated_or_altered_archive_is_refused(cut: float, archive: Path, folder: Path, fuse: Fuse) -> None:
    content = archive.read_bytes()
    (folder / "cut.pt2").write_bytes(content[: int(len(content) * cut)])
    flipped = bytearray(content)
    flipped[content.index(b'{"graph_module"') + 40] ^= 1
    (folder / "flipped.pt2").write_bytes(flipped)
    for name in ("cut.pt2", "flipped.pt2"):
        done = fuse(name, "--out", "fused")
        assert done.exit_code == 2
        assert "not a complete archive" in done.stderr


def test_a_foreign_folder_is_not_touched_and_an_earlier_output_survives_a_failed_run(
    folder: Path, fuse: Fuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("x")
    done = fuse("shelf:good", "--input", "1,3,17,15", "--out", "foreign")
    assert done.exit_code == 2
    assert "was not written by `kdexport fuse`" in done.stderr
    assert [path.name for path in (folder / "foreign").iterdir()] == ["thesis.tex"]

    assert fuse("shelf:plain", "--input", "1,3,9,9", "--out", "fused").exit_code == 0
    kept = {path.name: path.read_bytes() for path in (folder / "fused").iterdir()}
    right = compose.add
    monkeypatch.setattr(dataflow, "add", lambda *convs, coefficients: right(*convs[1:]))
    done = fuse("shelf:good", "--input", "1,3,17,15", "--out", "fused", "--json")
    assert done.exit_code == 1
    assert done.error["code"] == "KDX301"
    assert re.search(r"worst block [01] \(\d branches", done.error["message"])
    assert {path.name: path.read_bytes() for path in (folder / "fused").iterdir()} == kept


def test_a_shape_for_a_pt2_file_is_refused(archive: Path, fuse: Fuse, folder: Path) -> None:
    done = fuse(archive, "--out", "fused", "--input", "1,3,9,9")
    assert done.exit_code == 2
    assert "Omit --input" in done.stderr


def test_the_example_of_the_documentation_runs(folder: Path, fuse: Fuse) -> None:
    text = (Path(__file__).parents[3] / "docs" / "bring-your-own.md").read_text()
    (source,) = re.findall(r"```python\n# net\.py\n(.*?)```", text, flags=re.DOTALL)
    (command,) = re.findall(r"```sh\nkdexport fuse (.*?)\n```", text, flags=re.DOTALL)
    (folder / "net.py").write_text(source)
    done = fuse(*command.split())
    assert done.exit_code == 0, done.stderr
    assert "3 branches: 2 convolutions + 3 batch norms" in done.stdout
    (snippet,) = re.findall(r"In Python:\n\n```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(f"{source}\nnet = make()\n{snippet}", "docs", "exec"), names)
    assert names["fused"].certificate.holds
