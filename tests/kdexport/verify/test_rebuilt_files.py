"""The files of a bundle beside those that are made again from its unfused student."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file, save_file

from kdexport.bundle.manifest import MANIFEST, hash_files, read_manifest
from kdexport.errors import BundleError, OutputError, VerificationError
from kdexport.verify.rebuilt_files import rebuild_files
from tests.conftest import Built, Command

FP16 = "targets/trt-rtx-fp16/model.onnx"
FILES = ["student.safetensors", "model.onnx", "targets/onnx-fp32/model.onnx", FP16]


def rebuilt(folder: Path) -> dict[str, tuple[str, str]]:
    """The outcome and the fact of each file."""
    found = rebuild_files(folder, read_manifest(folder), None, lambda _: None)
    return {file.name: (file.outcome, file.fact) for file in found}


def edit_graph(path: Path, edit: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(str(path))
    edit(model)
    onnx.save(model, str(path))


def test_every_file_is_rebuilt_byte_by_byte_and_kept_on_request(built: Built, here: Command, tmp_path: Path) -> None:
    out = tmp_path / "new" / "rebuilt"
    done = here("replay", built.bundle, "--out", out, "--json")
    assert done.exit_code == 0, done.stderr
    assert [(file["name"], file["outcome"]) for file in done.data["files"]] == [(n, "byte-identical") for n in FILES]
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(FILES)
    for name in FILES:
        assert (out / name).read_bytes() == (built.bundle / name).read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["rebuilt"]


def test_a_changed_graph_is_named_with_its_node_and_exits_with_1(bundle_copy: Path, here: Command) -> None:
    def untransposed(model: onnx.ModelProto) -> None:
        del next(node for node in model.graph.node if node.op_type == "Gemm").attribute[:]

    edit_graph(bundle_copy / FP16, untransposed)
    done = here("replay", bundle_copy)
    assert done.exit_code == 1
    assert "3 byte-identical, 1 different: 4 files of " in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if line.startswith(FP16)]
    assert "different" in row
    assert "of node " in row


def test_other_bytes_of_the_same_graph_are_explained(bundle_copy: Path) -> None:
    def renamed(model: onnx.ModelProto) -> None:
        node = model.graph.node[0]
        node.name = "other"

    def other_metadata(model: onnx.ModelProto) -> None:
        model.metadata_props[0].value = "changed"
        model.producer_version = "0"

    copy = "targets/onnx-fp32/model.onnx"
    edit_graph(bundle_copy / copy, renamed)
    edit_graph(bundle_copy / FP16, other_metadata)
    path = bundle_copy / MANIFEST
    data = json.loads(path.read_text())
    data["versions"]["torch"] = "2.10.9"
    path.write_text(json.dumps(data))
    found = rebuilt(bundle_copy)
    assert found[copy][0] == found[FP16][0] == "equal"
    assert "other bytes in names, order or texts of the graph (torch 2.10.9 at the build, " in found[copy][1]
    assert "other bytes in the metadata and the producer (" in found[FP16][1]


def test_weights_that_were_changed_everywhere_are_found_at_their_fold(bundle_copy: Path) -> None:
    """The graph alone would be rebuilt from the changed weights, and be equal."""
    path = bundle_copy / "student.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("weight"))
    tensors[name].mul_(1.01)
    save_file(tensors, path)
    values = tensors[name].numpy()
    for file in ("model.onnx", "targets/onnx-fp32/model.onnx"):

        def replace(model: onnx.ModelProto) -> None:
            item = next(item for item in model.graph.initializer if item.name == name)
            item.CopyFrom(onnx.numpy_helper.from_array(values, name))

        edit_graph(bundle_copy / file, replace)
    found = rebuilt(bundle_copy)
    assert found["model.onnx"][0] == "byte-identical"
    outcome, fact = found["student.safetensors"]
    assert outcome == "different"
    assert "(up to 3e-07 allowed) layer " in fact


def test_files_that_cannot_be_read_differ(bundle_copy: Path) -> None:
    (bundle_copy / "model.onnx").write_bytes(b"no graph")
    (bundle_copy / FP16).unlink()
    found = rebuilt(bundle_copy)
    assert found["targets/onnx-fp32/model.onnx"][0] == "byte-identical"
    assert found["model.onnx"] == ("different", found["model.onnx"][1])
    assert found["model.onnx"][1].startswith("cannot be read: ")
    assert found[FP16][0] == "different"


def test_another_unfused_student_a_link_and_an_occupied_folder_stop_before_anything_is_made(
    bundle_copy: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(bundle_copy)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match="exists and is not an empty folder"):
        rebuild_files(bundle_copy, manifest, tmp_path / "out", lambda _: None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    path = bundle_copy / "unfused.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, path)
    with pytest.raises(VerificationError, match=r"unfused\.safetensors is missing or is not the file"):
        rebuild_files(bundle_copy, manifest, None, lambda _: None)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a symbolic link"):
        rebuild_files(bundle_copy, manifest, None, lambda _: None)
    assert "unfused.safetensors" in hash_files(bundle_copy)
