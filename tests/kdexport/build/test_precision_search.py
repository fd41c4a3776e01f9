"""`build --precision-search` on a student that int8 cannot represent: without it, with it, and its limits."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from kdexport.bundle.manifest import MANIFEST, hash_files, read_manifest
from kdexport.checkpoint import StudentSpec, save_checkpoint
from kdexport.data.datasets import DatasetSpec, open_dataset
from kdexport.data.preprocessing import Preprocessing
from kdexport.students import STUDENTS
from kdexport.verify.verdict import replay
from tests.conftest import Outcome, run_command
from tests.kdexport.optional_packages import require_openvino

require_openvino()
pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

TARGETS = ("onnx-int8", "openvino-int8", "trt-rtx-int8")
PREPROCESSING = Preprocessing(image_size=32, resize=32, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3))
DIGITS = DatasetSpec(name="digits")
FACTOR, FITTED = 2.0**12, 384
CONFIG = """
student = "mobilenetv2"
recipe = "digits"

[calibration]
method = "minmax"
images = 32

[precision_search]
images = 64
top1_drop = 0.05
evaluations = 8

[verify]
images = 24
task_images = 120
golden = 4

[latency]
sessions = 3
pairs = 10
max_slowdown = 0.9

# A loss that 120 images can decide.
[policy.D.int8]
top1_drop = 0.1
"""


def hostile_student(folder: Path) -> None:
    """Save a student that int8 represents well except for two channels, which are scaled up with equal outputs.

    Its classifier is fitted to random features. Activations are mostly positive and blocks add little, so that errors
    are not amplified. The first scaled channel lies between two convolutions and can be equalised; the second lies in
    front of the classifier.
    """
    images = open_dataset(DIGITS, "train")
    pixels = torch.from_numpy(PREPROCESSING.normalise(images.read(range(FITTED), PREPROCESSING)))
    torch.manual_seed(5)
    student = STUDENTS.build("mobilenetv2", num_classes=10, image_size=32)
    for name, module in student.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.constant_(module.bias, 0.0 if name.endswith("conv.7") else 1.5)
    for residual in student.get_submodule("blocks").modules():
        if getattr(residual, "residual", False):
            nn.init.constant_(residual.get_submodule("conv.7").get_parameter("weight"), 0.05)
    with torch.no_grad():
        student.train()(pixels)
        _fit_classifier(student.eval(), pixels, torch.from_numpy(images.labels[:FITTED]))
    weights = student.state_dict()
    _blow_up(weights, "blocks.5.0.conv.1", "blocks.5.0.conv.3.weight", along=0)
    _blow_up(weights, "conv2.1", "classifier.0.weight", along=1)
    spec = StudentSpec(
        student="mobilenetv2", classes=images.classes, preprocessing=PREPROCESSING, branches=None, provenance={}
    )
    save_checkpoint(folder, student, spec)


def _fit_classifier(student: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    linear = student.get_submodule("classifier.0")
    seen: list[torch.Tensor] = []
    hook = linear.register_forward_hook(lambda _m, given, _o: seen.append(given[0].double()))
    student(pixels)
    hook.remove()
    wanted = 10 * nn.functional.one_hot(labels, 10).double()
    features, answers = seen[0] - seen[0].mean(0), wanted - wanted.mean(0)
    ridge = 0.3 * features.square().sum(1).mean() * torch.eye(len(labels), dtype=torch.float64)
    weight = (features.T @ torch.linalg.solve(features @ features.T + ridge, answers)).T
    linear.get_parameter("weight").copy_(weight.float())
    linear.get_parameter("bias").copy_((wanted.mean(0) - weight @ seen[0].mean(0)).float())


def _blow_up(weights: dict[str, torch.Tensor], norm: str, reader: str, *, along: int) -> None:
    channel = 7
    for name in (f"{norm}.weight", f"{norm}.bias"):
        weights[name][channel] *= FACTOR
    weights[reader].select(along, channel).div_(FACTOR)


def build(root: Path, out: Path, target: str, *more: str) -> Outcome:
    return run_command(
        "build", "--config", root / "tiny.toml", "--checkpoint", root / "student", "--workspace", root / "ws",
        "--out", out, "--target", target, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a hostile student and of its configuration."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "tiny.toml").write_text(CONFIG)
    hostile_student(folder / "student")
    return folder


@pytest.fixture(scope="module")
def searched(root: Path) -> tuple[Path, str]:
    """The bundle that the search makes possible, and what the command printed."""
    done = build(root, root / "bundle", ",".join(TARGETS), "--precision-search")
    assert done.exit_code == 0, done.stderr
    return root / "bundle", done.stdout


def test_without_the_search_the_collapse_is_named_with_its_channels_and_the_remedy(root: Path) -> None:
    done = build(root, root / "plain", "onnx-int8")
    assert done.exit_code == 1
    lost = next(line for line in done.stderr.splitlines() if line.startswith("  D targets/onnx-int8/model.onnx: flips"))
    assert "; int8 collapses: by itself it changes the logits by " in lost
    assert "channel 7 reaches " in lost
    assert " of 8 bits" in lost
    said = (
        "Set method = 'auto' under [calibration], which compares ways to find the ranges. If that is not enough, build "
    )
    assert f"{said}with --precision-search" in done.stderr
    assert not (root / "plain").exists()


def test_with_the_search_every_check_holds_and_every_kept_layer_is_needed(searched: tuple[Path, str]) -> None:
    data = read_manifest(searched[0]).data
    # The engine of TensorRT-RTX is not executed without a GPU.
    assert {check["name"] for check in data["parity"] if not check["holds"]} <= {"execution"}
    ran = {(check["rung"], check["subject"]) for check in data["parity"]}
    files = [f"targets/{name}/model.onnx" for name in TARGETS]
    assert {("C", f"{name} on onnxruntime CPU") for name in files} | {("C", f"{files[1]} on OpenVINO CPU")} <= ran
    assert {("D", name) for name in (files[0], f"{files[1]} on OpenVINO", files[2])} <= ran
    plans = {name: entry["plan"] for name, entry in data["targets"].items()}
    # Between the last convolution and the classifier nothing can be scaled. TensorRT's form has levels on one side.
    kept = {name: {layer["weight"] for layer in plan["kept"]} for name, plan in plans.items()}
    assert kept["onnx-int8"] == kept["openvino-int8"] == {"conv2.0.weight", "classifier.0.weight"}
    assert kept["trt-rtx-int8"] == {"classifier.0.weight"}
    for plan in plans.values():
        scaled = {name: scaling["exponents"] for scaling in plan["equalised"] for name in scaling["first"]}
        assert scaled["blocks.5.0.conv.0.weight"][7] >= 6
        plain, chosen = plan["trades"][0], plan["trades"][plan["chosen"]]
        assert plan["collapsed"]
        assert plain["flips"] > 0.5
        assert chosen["flips"] <= plan["budget"]["flips"] == 0.1
        assert chosen["top1"] > plain["top1"] + 0.3
        assert plan["float32"]["bytes"] > chosen["bytes"] > plain["bytes"]
        assert len(plan["trades"]) <= 8


def test_the_cost_of_the_plan_is_printed_and_written_to_the_report(searched: tuple[Path, str]) -> None:
    bundle, printed = searched
    plan = read_manifest(bundle).data["targets"]["onnx-int8"]["plan"]
    chosen = plan["trades"][plan["chosen"]]
    for text in (printed, (bundle / "report.md").read_text()):
        assert "Precision plan of onnx-int8, openvino-int8\n" in text
        assert "Precision plan of trt-rtx-int8\n" in text
        row = next(line for line in text.splitlines() if "2 layers in float32" in line)
        for value in (f"{chosen['top1']:.2%}", f"{chosen['flips']:.2%}", f"{chosen['latency_ms']:.3f} ms"):
            assert value in row
        assert "Without a plan int8 collapses: its logits differ too much from the float32 ones." in text
        assert f"Kept in float32: {', '.join(layer['node'] for layer in plan['kept'])}." in text


def test_a_plan_that_the_files_do_not_follow_is_found_and_named(searched: tuple[Path, str], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(searched[0], tmp_path / "bundle"))
    data = json.loads((bundle / MANIFEST).read_text())
    plans = {name: entry["plan"] for name, entry in data["targets"].items()}
    dropped = plans["onnx-int8"]["kept"].pop()
    quantized = plans["openvino-int8"]["kept"][0]
    _quantize_weight(bundle / "targets" / "openvino-int8" / "model.onnx", quantized["node"])
    scaling = plans["trt-rtx-int8"]["equalised"][0]
    scaling["exponents"][3] += 2
    plans["trt-rtx-int8"]["kept"].append({"node": "node_conv2d", "weight": "conv1.0.weight"})
    data["files"] = hash_files(bundle)
    (bundle / MANIFEST).write_text(json.dumps(data))
    verdict = replay(bundle, read_manifest(bundle), lambda _: None)
    failed = {(check.subject, check.name): check.detail for check in verdict.failures}
    onnx_file, openvino_file, engine_file = (f"targets/{name}/model.onnx" for name in TARGETS)
    assert (
        f"{dropped['node']} reads its weight {dropped['weight']} in float32" in failed[onnx_file, "precision int8-u8"]
    )
    assert (onnx_file, "integer kernels") in failed
    assert (
        f"{quantized['node']} has no float32 weight, and the plan keeps it in float32"
        in failed[openvino_file, "precision int8-u8"]
    )
    assert f"{scaling['first'][0]} (" in failed[engine_file, "weights"]
    assert "node_conv2d has no float32 weight" in failed[engine_file, "precision int8-s8"]
    assert "has no float32 kernel that computes it" in failed["targets/trt-rtx-int8/model.plan", "readable"]


def _quantize_weight(path: Path, name: str) -> None:
    model = onnx.load(str(path))
    node = next(node for node in model.graph.node if node.name == name)
    item = next(item for item in model.graph.initializer if item.name == node.input[1])
    values = numpy_helper.to_array(item)
    scale = np.float32(np.abs(values).max() / 127)
    parts = {"levels": (values / scale).round().astype(np.int8), "step": scale, "zero": np.int8(0)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), f"unkept_{k}") for k, v in parts.items())
    place = list(model.graph.node).index(node)
    node.input[1] = "unkept"
    inputs = [f"unkept_{part}" for part in parts]
    model.graph.node.insert(place, helper.make_node("DequantizeLinear", inputs, ["unkept"], "unkeep"))
    onnx.save(model, str(path))


def test_a_search_without_an_int8_target_is_refused_before_any_work(root: Path, tmp_path: Path) -> None:
    done = build(root, tmp_path / "out", "onnx-fp32,trt-rtx-fp16", "--precision-search")
    assert done.exit_code == 2
    assert "The precision search needs an int8 target; the targets are onnx-fp32, trt-rtx-fp16." in done.stderr
