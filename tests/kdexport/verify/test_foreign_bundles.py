"""A bundle of a network that is not ours, with attention and gates: verified, and each change of it is seen."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file

from kdexport.backends.ort import CPU
from kdexport.bundle.manifest import read_golden, read_manifest
from kdexport.errors import KdexportError
from kdexport.serving.limits import Limits
from kdexport.serving.loading import load
from kdexport.verify.golden_limits import allowed_error
from kdexport.verify.verdict import replay
from tests.conftest import Command, made_once, run_command
from tests.kdexport.gate.edited_bundles import edited
from tests.kdexport.other_networks import gated_attention_network

CONFIG = """
student = "tests.kdexport.other_networks:gated_attention_network"
targets = ["onnx-fp32", "onnx-int8"]

[preprocessing]
mean = [0.5, 0.4, 0.3]
std = [0.3, 0.25, 0.35]

[export]
input = "uint8-nchw"
output = "probabilities"

[verify]
images = 20
golden = 6

[latency]
sessions = 3
pairs = 10
max_slowdown = 0.9
"""


def make(root: Path) -> None:
    """The bundle, and 60 images of each of six colours that it was built with."""
    rng = np.random.default_rng(11)
    for split, count in (("train", 60), ("val", 20)):
        for label in range(6):
            folder = root / "data" / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                blocks = rng.integers(40, 216, (8, 8, 3)).repeat(4, 0).repeat(4, 1)
                blocks[..., label % 3] //= 1 + label // 3
                Image.fromarray(blocks.astype(np.uint8)).save(folder / f"{index}.png")
    (root / "config.toml").write_text(CONFIG)
    done = run_command(
        "build", "--config", root / "config.toml", "--weights", "own", "--image-size", "32", "--data", root / "data",
        "--out", root / "bundle", "--workspace", root / "ws", "--json", cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.exit_code in (0, 3), done.stderr
    assert "made\n" in done.stderr
    assert {name: entry["status"] for name, entry in done.data["targets"].items()} == {
        "onnx-fp32": "verified",
        "onnx-int8": "verified",
    }


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "foreign", make) / "bundle"


@pytest.fixture
def copy(foreign: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(foreign, tmp_path / "bundle"))


def failures(folder: Path) -> str:
    """What verification says against ``folder``; empty if it says nothing."""
    try:
        return "\n".join(check.line for check in replay(folder, read_manifest(folder), lambda _: None).failures)
    except KdexportError as error:
        return error.message


def test_the_bundle_is_what_was_trained_and_has_layers_that_are_not_linear(foreign: Path) -> None:
    assert failures(foreign) == ""
    kinds = {node.op_type for node in onnx.load(foreign / "model.onnx").graph.node}
    assert {"Softmax", "HardSwish", "HardSigmoid", "LayerNormalization", "Gelu"} <= kinds
    assert "BatchNormalization" not in kinds


def test_neither_the_code_of_the_network_nor_its_library_is_needed(
    foreign: Path, kdexport: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (foreign / "program.json").is_file()
    for name in ("tests", "timm"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    verified = kdexport("verify", foreign, cwd=tmp_path)
    assert verified.exit_code in (0, 3), verified.stderr


def test_the_server_takes_and_gives_what_was_asked_for(foreign: Path) -> None:
    manifest = read_manifest(foreign)
    model = load(
        foreign, name="net", version=1, provider=CPU, limits=Limits(), allowed_error=allowed_error(foreign, manifest)
    )
    assert (model.signature.shape, model.signature.datatype) == ([3, 32, 32], "UINT8")
    assert model.signature.outputs == ("probabilities", "logits")
    pixels = read_golden(foreign, manifest)
    planes = np.ascontiguousarray(np.moveaxis(pixels, 3, 1))
    np.testing.assert_array_equal(model.tensor(pixels[0]), planes[:1])
    with torch.no_grad():
        mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.3, 0.25, 0.35]))
        expected = gated_attention_network()((torch.from_numpy(planes) / 255 - mean) / std)
    np.testing.assert_allclose(model.logits(planes), expected, rtol=1e-4, atol=1e-5)


def scale_in_graphs(folder: Path, old: torch.Tensor, new: torch.Tensor) -> int:
    """Replace a folded weight in every float graph, as a fold with a wrong coefficient writes it."""
    replaced = 0
    for path in folder.rglob("*.onnx"):
        model = onnx.load(path)
        for item in model.graph.initializer:
            if item.data_type == onnx.TensorProto.FLOAT and np.array_equal(numpy_helper.to_array(item), old.numpy()):
                item.CopyFrom(numpy_helper.from_array(new.numpy(), item.name))
                replaced += 1
        onnx.save(model, path)
    return replaced


def wrong_merge(folder: Path) -> None:
    weights = load_file(folder / "student.safetensors")
    name = next(name for name in sorted(weights) if weights[name].dim() == 4)
    # Some versions of safetensors map the file, which is written again below.
    old, weights[name] = weights[name].clone(), weights[name] * (1 + 1e-4)
    save_file(weights, folder / "student.safetensors")
    assert scale_in_graphs(folder, old, weights[name])
    edited(folder, lambda data: None)


def changed_weight(folder: Path) -> None:
    weights = load_file(folder / "unfused.safetensors")
    name = next(name for name in sorted(weights) if weights[name].dim() == 4)
    weights[name][0] *= 1.001
    save_file(weights, folder / "unfused.safetensors")
    digest = hashlib.sha256((folder / "unfused.safetensors").read_bytes()).hexdigest()
    edited(folder, lambda data: data["provenance"].__setitem__("checkpoint_sha256", digest))


def other_program(folder: Path) -> None:
    path = folder / "program.json"
    text = path.read_text()
    assert "aten.silu" in text
    path.write_text(text.replace("aten.silu", "aten.gelu", 1))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edited(folder, lambda data: data["student"].__setitem__("program_sha256", digest))


def preprocessed(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edited(folder, lambda data: data["student"]["preprocessing"].update(changes))

    return change


def other_graph(folder: Path) -> None:
    """The attention without its scale, in the file that is served."""
    path = folder / "targets" / "onnx-fp32" / "model.onnx"
    model = onnx.load(path)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    softmax.op_type = "LogSoftmax"
    onnx.save(model, path)
    edited(folder, lambda data: None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (wrong_merge, "A student.safetensors: weights are the folded ones"),
        (changed_weight, "A student.safetensors: weights are the folded ones"),
        (other_graph, "graph"),
        (preprocessed(mean=[0.45, 0.4, 0.3]), "golden"),
        (preprocessed(interpolation="nearest", resize=48), "golden"),
    ],
    ids=["merge", "weight", "graph", "mean", "interpolation"],
)
def test_a_change_with_new_digests_is_seen_by_verify(copy: Path, change: Callable[[Path], None], words: str) -> None:
    change(copy)
    said = failures(copy)
    assert said
    assert words in said, said


def test_verify_of_another_program_ends_with_exit_code_1(copy: Path, here: Command) -> None:
    other_program(copy)
    done = here("verify", copy, "--json")
    assert done.exit_code == 1
    assert done.answer["ok"] is False
