"""Every target that this machine can build: built by the command, verified, served, and damaged on purpose."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from kdexport.backends.ort import CPU, CUDA, load_model
from kdexport.bundle.manifest import MANIFEST, NOT_EXECUTED, hash_files, read_golden, read_manifest
from kdexport.diagnose.environment import examine_bundle
from kdexport.errors import BackendUnavailableError, BundleError, VerificationError
from kdexport.gate.accuracy import require_golden_logits
from kdexport.gate.arms import artifact, open_bundle
from kdexport.graph.calibration_choice import COMPARED, name_of
from kdexport.serving.isolated_load import try_bundle
from kdexport.serving.limits import Limits
from kdexport.serving.loading import load
from kdexport.timing.http_client import serving
from kdexport.verify.check import Check
from kdexport.verify.own_logits_checks import check_own_logits
from kdexport.verify.policy import LowPolicy
from kdexport.verify.student_checks import calibrated_by
from kdexport.verify.verdict import replay
from tests.conftest import Built, Command, run_command
from tests.kdexport.optional_packages import require_openvino

require_openvino()
pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

TARGETS = ("onnx-int8", "openvino-int8", "trt-rtx-bf16", "trt-rtx-int8")
Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def bundle(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of the shared bundle, fused and exported already, in more targets, with a calibration by choice."""
    out = tmp_path_factory.mktemp("targets") / "bundle"
    config = out.with_name("auto.toml")
    config.write_text(f'{built.config.read_text()}\n[calibration]\nmethod = "auto"\nimages = 64\n')
    done = run_command(
        "build", "--config", config, "--checkpoint", built.checkpoint, "--workspace", built.workspace,
        "--out", out, "--target", ",".join(TARGETS), "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    for form in ("int8-u8", "int8-s8"):
        assert done.stderr.count(f"{form}: calibrated by ") == 1
    return out


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Callable[[str, Edit], list[Check]]:
    """Change the ONNX file of a target, write its digest again, and return the failed checks of that file."""

    def run(target: str, edit: Edit) -> list[Check]:
        folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
        path = folder / "targets" / target / "model.onnx"
        model = onnx.load(str(path))
        edit(model)
        onnx.save(model, str(path))
        data = json.loads((folder / MANIFEST).read_text())
        # Checks of the other targets are not of interest here.
        for name in set(data["targets"]) - {target}:
            del data["targets"][name]
            shutil.rmtree(folder / "targets" / name)
        data["files"] = hash_files(folder)
        (folder / MANIFEST).write_text(json.dumps(data))
        return [c for c in replay(folder, read_manifest(folder), lambda _: None).checks if c.failed]

    return run


def edited(name: str, change: Callable[[Any], Any]) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        item = next(item for item in model.graph.initializer if item.name == name)
        item.CopyFrom(numpy_helper.from_array(np.asarray(change(numpy_helper.to_array(item).copy())), name))

    return edit


def test_every_target_is_verified_or_marked_as_not_run(bundle: Path) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    assert tuple(data["targets"]) == tuple(sorted(TARGETS))
    for name, entry in data["targets"].items():
        assert entry["status"] == ("built, not executed" if entry["engine"] else "verified"), name
        assert entry["form"] in ("fp32", "bf16", "int8-u8", "int8-s8")
        assert ("calibration" in entry) is name.endswith("int8")
    assert data["targets"]["onnx-int8"]["calibration"]["split"] == "train"
    for name in ("onnx-int8", "openvino-int8", "trt-rtx-int8"):
        chosen = data["targets"][name]["calibration"]["chosen"]
        assert chosen["divergence"][name_of(chosen["method"], chosen["percentile"])] == min(
            chosen["divergence"].values()
        )
        assert len(chosen["divergence"]) == len(COMPARED)
    # The simulation of rung C cuts off what the file cuts off.
    assert calibrated_by(read_manifest(bundle)) == {
        form: (entry["method"], entry["percentile"])
        for form, entry in (
            ("int8-u8", data["targets"]["onnx-int8"]["calibration"]["chosen"]),
            ("int8-s8", data["targets"]["trt-rtx-int8"]["calibration"]["chosen"]),
        )
    }
    # Each form has its own.
    chosen = {name: data["targets"][name]["calibration"]["chosen"] for name in TARGETS if name.endswith("int8")}
    assert chosen["onnx-int8"] == chosen["openvino-int8"] != chosen["trt-rtx-int8"]
    bits = {name: entry["calibration"]["weight_bits"] for name, entry in data["targets"].items() if name[-4:] == "int8"}
    assert bits == {"onnx-int8": 7, "openvino-int8": 7, "trt-rtx-int8": 8}
    for name, most in (("onnx-int8", 64), ("trt-rtx-int8", 127)):
        graph = onnx.load(str(bundle / "targets" / name / "model.onnx")).graph
        levels = [numpy_helper.to_array(item) for item in graph.initializer if item.name.endswith("weight_quantized")]
        assert max(int(abs(value.astype(int)).max()) for value in levels) == most, name
    layers = data["targets"]["trt-rtx-int8"]["layers"]
    assert layers["correlation"] == data["operators"]["fused"]["Conv"]
    rungs = {(c["rung"], c["subject"]) for c in data["parity"]}
    for subject in (
        "targets/onnx-int8/model.onnx on onnxruntime CPU", "targets/openvino-int8/model.onnx on OpenVINO CPU",
        "targets/trt-rtx-bf16/model.onnx on onnxruntime CPU", "targets/trt-rtx-int8/model.onnx on onnxruntime CPU",
    ):  # fmt: skip
        assert ("C", subject) in rungs
    facts = {(c["subject"], c["name"]): c["detail"] for c in data["parity"]}
    assert facts["targets/onnx-int8/model.onnx", "integer kernels"].startswith(f"{layers['correlation']} QLinearConv")
    for subject in (
        "targets/onnx-int8/model.onnx on onnxruntime CPU",
        "targets/openvino-int8/model.onnx on OpenVINO CPU",
    ):
        assert facts[subject, "dynamic batch"] == "batches of 1 and 3 gave 1 and 3 rows"


def test_the_plan_holds_no_metadata_of_kdexport_and_the_manifest_names_its_builder(bundle: Path) -> None:
    for name in ("trt-rtx-bf16", "trt-rtx-int8"):
        assert b"kdexport" not in (bundle / "targets" / name / "model.plan").read_bytes()
        entry = json.loads((bundle / MANIFEST).read_text())["targets"][name]
        assert entry["version"].startswith("1.")
        assert entry["kernels"] > 50


def test_a_wrong_scale_is_caught_and_named(damaged: Callable[[str, Edit], list[Check]]) -> None:
    found = damaged("onnx-int8", edited("relu_3_scale", lambda scale: scale * np.float32(1.5)))
    named = next(check for check in found if check.name == "scales")
    assert named.detail.startswith("relu_3_scale is ")


def test_a_dropped_bias_is_caught_and_named(damaged: Callable[[str, Edit], list[Check]]) -> None:
    dropped: list[str] = []

    def drop(model: onnx.ModelProto) -> None:
        node = [node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 3][-1]
        dropped.append(node.input[2].removesuffix("_dq").partition("_DequantizeLinear")[0])
        del node.input[2:]

    found = damaged("openvino-int8", drop)
    named = next(check for check in found if check.name == "weights")
    assert f"layer {dropped[0]} (absent)" in named.detail


def test_a_swapped_class_order_is_caught_and_named(damaged: Callable[[str, Edit], list[Check]]) -> None:
    order = [1, 0, *range(2, 10)]

    def swap(model: onnx.ModelProto) -> None:
        gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
        producers = {name: node for node in model.graph.node for name in node.output}
        for name in gemm.input[1:]:
            for part in producers[name].input:
                if next(i for i in model.graph.initializer if i.name == part).dims:
                    edited(part, lambda values: values[order])(model)

    found = damaged("onnx-int8", swap)
    assert "classifier" in next(check for check in found if check.name == "weights").detail
    assert any(check.rung == "C" for check in found)


def test_a_float32_leftover_is_caught_and_named(damaged: Callable[[str, Edit], list[Check]]) -> None:
    def widen(model: onnx.ModelProto) -> None:
        node = [node for node in model.graph.node if node.op_type == "Conv"][5]
        pair = next(other for other in model.graph.node if other.output[0] == node.input[1])
        levels, scale = (
            numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == part)) for part in pair.input[:2]
        )
        values = (levels * scale.reshape(-1, 1, 1, 1)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, "left over"))
        node.input[1] = "left over"

    found = damaged("onnx-int8", widen)
    assert "reads its weight left over in float32" in next(c for c in found if c.name == "precision int8-u8").detail
    assert "1 " in next(c for c in found if c.name == "integer kernels").detail


def test_a_float32_weight_in_a_bfloat16_file_is_caught_and_named(damaged: Callable[[str, Edit], list[Check]]) -> None:
    def widen(model: onnx.ModelProto) -> None:
        item = next(i for i in model.graph.initializer if i.data_type == TensorProto.BFLOAT16 and len(i.dims) == 4)
        values = numpy_helper.to_array(item).astype(np.float32)
        item.CopyFrom(numpy_helper.from_array(values, item.name))

    found = damaged("trt-rtx-bf16", widen)
    assert found
    assert any("model.onnx" in check.subject for check in found)


def test_a_batch_that_is_not_dynamic_is_caught(damaged: Callable[[str, Edit], list[Check]]) -> None:
    def fix(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 2

    found = damaged("openvino-int8", fix)
    assert {check.name for check in found} >= {"dynamic batch", "dynamic float32 input and logits"}
    assert "batch of 1: " in next(check for check in found if check.name == "dynamic batch").detail


@pytest.mark.parametrize("target", ["onnx-bf16", "openvino-bf16", "trt-int8"])
def test_a_precision_or_provider_that_this_machine_lacks_exits_4_before_any_work(
    kdexport: Command, built: Built, tmp_path: Path, target: str
) -> None:
    if target == "openvino-bf16":
        from kdexport.backends.openvino import capabilities

        if "BF16" in capabilities():
            pytest.skip("this processor has bfloat16")
    done = kdexport(
        "build", "--config", built.config, "--target", f"onnx-fp32,{target}", "--out", tmp_path / "out",
        "--workspace", tmp_path / "ws",
    )  # fmt: skip
    assert done.exit_code == 4
    assert f"Target {target} cannot be built: " in done.stderr
    assert not (tmp_path / "ws").exists()


def test_only_the_int8_target_is_served_as_int8(bundle: Path, tmp_path: Path) -> None:
    allowed = try_bundle(bundle, CPU, Limits(), "onnx-int8")
    model = load(
        bundle, name="m", version=1, provider=CPU, limits=Limits(), allowed_error=allowed, target="onnx-int8"
    )  # fmt: skip
    float32 = load_model(bundle / "model.onnx")
    int8 = load_model(bundle / "targets" / "onnx-int8" / "model.onnx")
    size = model.signature.image_size
    images = np.random.default_rng(3).standard_normal((4, 3, size, size)).astype(np.float32)
    assert np.array_equal(model.logits(images), int8.logits(images))
    assert not np.array_equal(model.logits(images), float32.logits(images))
    # The error of int8, not of float32: the factor of rung C times the error of the same file on the same machine.
    assert allowed == pytest.approx(LowPolicy().max_error * model.golden.error, rel=1e-3)
    assert allowed > 100 * try_bundle(bundle, CPU, Limits())
    for target, provider, words in (
        ("onnx-fp16", CPU, "CPUExecutionProvider would run onnx-fp16 in another precision"),
        ("onnx-int8", CUDA, "CUDAExecutionProvider would run onnx-int8 in another precision"),
        ("openvino-int8", CPU, "with onnxruntime, not openvino-int8"),
        ("trt-rtx-int8", CPU, "with onnxruntime, not trt-rtx-int8"),
    ):
        with pytest.raises(BackendUnavailableError, match=words) as caught:
            examine_bundle(bundle, provider, target)
        assert caught.value.exit_code == 4
    data = json.loads((bundle / "manifest.json").read_text())
    others = {name: entry for name, entry in data["targets"].items() if name != "onnx-int8"}
    unproven = {**data["targets"]["onnx-int8"], "status": NOT_EXECUTED}
    for number, (targets, words) in enumerate(
        ((others, "was not built"), ({**others, "onnx-int8": unproven}, "is 'built, not executed', not verified"))
    ):
        copy = Path(shutil.copytree(bundle, tmp_path / str(number)))
        (copy / MANIFEST).write_text(json.dumps({**data, "targets": targets}))
        with pytest.raises(BundleError, match=f"onnx-int8 {words}"):
            examine_bundle(copy, CPU, "onnx-int8")


def test_zero_points_off_by_one_pass_the_limit_of_int8_and_are_found_by_its_own_golden_logits(
    bundle: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    path = folder / "targets" / "onnx-int8" / "model.onnx"
    assert examine_bundle(folder, CPU, "onnx-int8")[-1].fact == "bit for bit those of the build"
    model = onnx.load(str(path))
    points = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for item in model.graph.initializer:
        values = numpy_helper.to_array(item)
        if item.name in points and values.dtype == np.uint8:
            item.CopyFrom(numpy_helper.from_array(np.where(values == 255, 254, values + 1).astype(np.uint8), item.name))
    onnx.save(model, str(path))
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"] = hash_files(folder)
    places: tuple[dict[str, str], ...] = ({}, {"processor": "another one"}, {"version": "0.9"})
    for place in places:
        data["targets"]["onnx-int8"]["golden"] |= place
        found = "elsewhere" if place else "none on the processor and version of the build"
        (folder / MANIFEST).write_text(json.dumps(data))
        with pytest.raises(VerificationError, match=f"golden logits of onnx-int8 are not its own: .*{found}"):
            examine_bundle(folder, CPU, "onnx-int8")
        opened = open_bundle(folder)
        with pytest.raises(VerificationError, match=f"of its logits of the golden images .*{found}"):
            require_golden_logits(artifact(opened, "onnx-int8", "fused", tmp_path), opened, 1)
        assert own_check(folder).failed
    del data["targets"]["onnx-int8"]["golden"]
    (folder / MANIFEST).write_text(json.dumps(data))
    # The rule of earlier versions, by which the same file passes.
    fact = examine_bundle(folder, CPU, "onnx-int8")[-1]
    assert (fact.ok, fact.fact) == (False, "not recorded: an earlier version built the bundle")
    absent = own_check(folder)
    assert absent.detail.startswith("not recorded")
    assert (absent.ran, absent.holds, absent.failed) == (False, False, False)


def own_check(folder: Path) -> Check:
    manifest = read_manifest(folder)
    (check,) = check_own_logits(folder, manifest, "onnx-int8", read_golden(folder, manifest))
    return check


def test_the_clock_serve_gives_each_target_a_server_of_its_own(bundle: Path) -> None:
    arms = {name: (str(bundle), target) for name, target in (("a", "onnx-fp32"), ("b", "onnx-int8"))}
    with serving(arms) as client:
        images = np.random.default_rng(3).standard_normal((1, 3, 32, 32)).astype(np.float32)
        answers: dict[str, bytes] = {}
        for name in arms:
            client.request(name, images)()
            connection = client.connections[name]
            size = {"Inference-Header-Content-Length": "0"}
            connection.request("POST", f"/v2/models/{name}/infer", images.tobytes(), size)
            answers[name] = connection.getresponse().read()[-40:]
    for name, file in (("a", "model.onnx"), ("b", "targets/onnx-int8/model.onnx")):
        assert answers[name] == load_model(bundle / file, threads=1).logits(images).tobytes(), name
