"""A bundle whose target takes pixels: verified, audited, served, timed, and refused where it cannot be used."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from kdexport.backends.file_interface import FileInterface
from kdexport.backends.ort import CPU, load_model
from kdexport.bundle.manifest import hash_files, read_golden, read_manifest
from kdexport.diagnose.bisect import explain
from kdexport.errors import AuditError, ConfigError, KdexportError, VerificationError
from kdexport.gate.accuracy import accuracy_gates
from kdexport.gate.arms import artifact, open_bundle
from kdexport.serving.limits import Limits
from kdexport.serving.loading import load
from kdexport.serving.triton.variants import TritonRequest, plan_export
from kdexport.serving.triton.writer import export_triton
from kdexport.targets import parse_targets, require_interface
from kdexport.timing.session import Arm, Request, measure_session, run_session
from kdexport.verify.golden_limits import allowed_error
from kdexport.verify.verdict import Verdict, replay, seal
from tests.conftest import made_once
from tests.kdexport.gate.edited_bundles import edited
from tests.kdexport.serving.running_server import Running, running
from tests.kdexport.serving.served_bundles import CLASSES, encoded, make_bundle, photo

FILE = "targets/onnx-fp32/model.onnx"


@pytest.fixture(scope="session")
def pixel_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pixels in, probabilities and logits out: a verified bundle that no test changes."""
    interface = FileInterface("uint8-nhwc", "probabilities")
    return made_once(tmp_path_factory, "pixels", lambda root: make_bundle(root, interface=interface)) / "bundle"


@pytest.fixture(scope="session")
def server(pixel_bundle: Path) -> Iterator[Running]:
    """A server of the bundle."""
    with running(f"zoo={pixel_bundle}", "--instances", "1", "--drain", "0.2") as started:
        yield started


def golden_pixels(bundle: Path) -> NDArray[np.uint8]:
    return read_golden(bundle, read_manifest(bundle))


def float_logits(bundle: Path) -> NDArray[np.float32]:
    """The logits of the golden images by the float32 graph, from the values that its documentation defines."""
    preprocessing = read_manifest(bundle).spec.preprocessing
    mean, std = (np.asarray(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    images = (golden_pixels(bundle).astype(np.float32) / np.float32(255) - mean) / std
    return load_model(bundle / "model.onnx").logits(np.ascontiguousarray(np.moveaxis(images, 3, 1)))


def test_the_manifest_and_every_check_are_of_the_pixels(pixel_bundle: Path) -> None:
    manifest = read_manifest(pixel_bundle)
    assert manifest.targets["onnx-fp32"]["input"] == "uint8-nhwc"
    assert manifest.targets["onnx-fp32"]["status"] == "verified"
    checks = {(check["subject"], check["name"]): check for check in manifest.data["parity"]}
    assert all(check["holds"] for check in checks.values())
    assert (FILE, "dynamic uint8-nhwc input and probabilities and logits") in checks
    assert ("model.onnx", "dynamic float32 input and logits") in checks
    # Both runs are measured, not only the float32 graph.
    for name in ("model.onnx", FILE):
        assert (f"{name} on onnxruntime CPU", "max error") in checks


def change_constant(name: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        item = next(item for item in model.graph.initializer if item.name == name)
        values = numpy_helper.to_array(item) * np.float32(factor)
        item.CopyFrom(numpy_helper.from_array(np.asarray(values), name))

    return change


@pytest.mark.parametrize(("name", "factor"), [("pixels_mean", 1.05), ("pixels_std", 0.95), ("pixels_largest", 1 / 255)])
def test_a_wrong_normalisation_is_not_served_and_is_blamed(
    pixel_bundle: Path, tmp_path: Path, name: str, factor: float
) -> None:
    bundle = Path(shutil.copytree(pixel_bundle, tmp_path / "bundle"))
    model = onnx.load(str(bundle / FILE))
    change_constant(name, factor)(model)
    onnx.save(model, str(bundle / FILE))
    data = json.loads((bundle / "manifest.json").read_text())
    data["files"] = hash_files(bundle)
    (bundle / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(VerificationError, match="differ from those of the reference"):
        loaded(bundle)
    if name == "pixels_mean":
        found = explain(bundle, read_manifest(bundle), tmp_path / "blame", lambda _: None)
        assert found is not None
        assert found.file == FILE
        assert "another normalisation or softmax" in found.words


def test_a_manifest_that_states_the_other_layout_is_refused(pixel_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(pixel_bundle, tmp_path / "bundle"))
    data = json.loads((bundle / "manifest.json").read_text())
    data["targets"]["onnx-fp32"]["input"] = "uint8-nchw"
    (bundle / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(AuditError, match="requires one uint8-nchw input"):
        loaded(bundle)
    data["targets"]["onnx-fp32"]["input"] = "pixels"
    (bundle / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(KdexportError, match="input"):
        read_manifest(bundle)


def loaded(bundle: Path) -> object:
    allowed = allowed_error(bundle, read_manifest(bundle))
    return load(bundle, name="zoo", version=1, provider=CPU, limits=Limits(), allowed_error=allowed)


def test_the_server_takes_pixels_and_says_so(pixel_bundle: Path, server: Running) -> None:
    (described,) = server.ask("GET", "/v2/models/zoo").data["inputs"]
    assert described == {"name": "input", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}
    (configured,) = server.ask("GET", "/v2/models/zoo/config").data["input"]
    assert (configured["data_type"], configured["dims"]) == ("TYPE_UINT8", [32, 32, 3])
    pixels, expected = golden_pixels(pixel_bundle)[:2], float_logits(pixel_bundle)[:2]
    tensor = {"name": "input", "datatype": "UINT8", "shape": [2, 32, 32, 3], "data": pixels.reshape(-1).tolist()}
    answer = server.ask("POST", "/v2/models/zoo/infer", json.dumps({"inputs": [tensor]}).encode())
    (found,) = (np.reshape(o["data"], (2, -1)) for o in answer.data["outputs"] if o["name"] == "logits")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    raw = server.ask("POST", "/v2/models/zoo/infer", pixels.tobytes(), {"Inference-Header-Content-Length": "0"})
    length = int(raw.headers["inference-header-content-length"])
    both = np.frombuffer(raw.body[length:], "<f4").reshape(2, 2, len(CLASSES))
    np.testing.assert_array_equal(both[1], np.float32(found))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"datatype": "FP32"}, "takes 'UINT8'"),
        ({"shape": [1, 3, 32, 32]}, r"takes \[n, 32, 32, 3\]"),
        ({"data": [256] + [0] * 3071}, "integer from 0 to 255"),
        ({"data": [-1] + [0] * 3071}, "integer from 0 to 255"),
        ({"data": [0.5] + [0] * 3071}, "integer from 0 to 255"),
        ({"data": [True] + [0] * 3071}, "integer from 0 to 255"),
        ({"data": [0] * 3070}, "3,070 elements"),
    ],
)
def test_what_is_no_pixel_is_refused(server: Running, change: dict[str, Any], said: str) -> None:
    tensor = {"name": "input", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072, **change}
    answer = server.ask("POST", "/v2/models/zoo/infer", json.dumps({"inputs": [tensor]}).encode())
    assert answer.status == 400
    assert re.search(said, answer.error)


def test_an_image_is_classified_as_by_the_float32_graph(pixel_bundle: Path, server: Running) -> None:
    picture = photo(90, 70, 11)
    answer = server.ask("POST", "/v1/classify?top=7", encoded(picture, "PNG"))
    preprocessing = read_manifest(pixel_bundle).spec.preprocessing
    images = preprocessing.normalise(preprocessing.pixels(picture)[np.newaxis])
    logits = load_model(pixel_bundle / "model.onnx").logits(images)[0].astype(np.float64)
    powers = np.exp(logits - logits.max())
    expected = powers / powers.sum()
    found = {entry["index"]: entry["probability"] for entry in answer.data["predictions"]}
    np.testing.assert_allclose([found[index] for index in range(7)], expected, atol=1e-3)


def test_a_session_feeds_each_arm_what_it_takes(pixel_bundle: Path) -> None:
    arms = [Arm(path=str(pixel_bundle / name)) for name in ("model.onnx", FILE)]
    request = Request(
        reference=arms[0], candidate=arms[1], clock="host", image_size=32, batch=2, threads=1, cpus=(), pairs=4, seed=0
    )
    assert measure_session(request).candidate_ms > 0


def test_the_unfused_student_takes_the_same_pixels_and_is_timed_and_served(pixel_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(pixel_bundle)
    fused, unfused = (artifact(bundle, "onnx-fp32", variant, tmp_path) for variant in ("fused", "unfused"))
    files = [onnx.load(str(arm.model)) for arm in (fused, unfused)]
    kinds = [[node.op_type for node in file.graph.node] for file in files]
    # The normalisation in front of both, and a softmax behind both.
    assert kinds[0][:5] == kinds[1][:5] == ["Transpose", "Cast", "Div", "Sub", "Div"]
    assert kinds[0][-1] == kinds[1][-1] == "Softmax"
    pixels = golden_pixels(pixel_bundle)
    given = [load_model(arm.model).logits(pixels) for arm in (fused, unfused)]
    assert len({arm.sha256 for arm in (fused, unfused)}) == 2
    np.testing.assert_allclose(given[0], given[1], rtol=0, atol=1e-5 * float(np.abs(given[1]).max()))
    np.testing.assert_allclose(given[1], float_logits(pixel_bundle), rtol=0, atol=1e-5 * float(np.abs(given[1]).max()))
    for clock in ("host", "serve"):
        request = Request(
            reference=Arm(path=unfused.path(clock)), candidate=Arm(path=fused.path(clock)), clock=clock,
            image_size=32, batch=2, threads=1, cpus=(), pairs=4, seed=0,
        )  # fmt: skip
        assert run_session(request).reference_ms > 0
    flips, _ = accuracy_gates([(unfused, bundle), (fused, bundle)], (0.5, 0.5), None, 1)
    assert flips.estimate.value == 0.0


def test_what_cannot_take_pixels_refuses_them_by_name() -> None:
    require_interface(parse_targets(["onnx-fp32", "openvino-int8"]), FileInterface("uint8-nchw", "probabilities"))
    require_interface(parse_targets(["trt-rtx-fp16"]), FileInterface())
    with pytest.raises(ConfigError, match="trt-rtx-fp16 cannot take uint8-nchw"):
        require_interface(parse_targets(["onnx-fp32", "trt-rtx-fp16"]), FileInterface("uint8-nchw"))
    with pytest.raises(ConfigError, match="trt-rtx-fp16 cannot give probabilities"):
        require_interface(parse_targets(["onnx-fp32", "trt-rtx-fp16"]), FileInterface(gives="probabilities"))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values = np.asarray(logits, np.float64)
    powers = np.exp(values - values.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def test_a_file_gives_probabilities_first_and_every_check_holds(pixel_bundle: Path) -> None:
    manifest = read_manifest(pixel_bundle)
    assert manifest.targets["onnx-fp32"]["output"] == "probabilities"
    checks = {(check["subject"], check["name"]): check for check in manifest.data["parity"]}
    assert all(check["holds"] for check in checks.values())
    assert {(FILE, "dynamic uint8-nhwc input and probabilities and logits"), (FILE, "probabilities")} <= checks.keys()
    assert ("model.onnx", "probabilities") not in checks
    session = load_model(pixel_bundle / FILE).session
    assert [item.name for item in session.get_outputs()] == ["probabilities", "logits"]
    given, logits = session.run(None, {"input": golden_pixels(pixel_bundle)})
    np.testing.assert_allclose(given, softmax(float_logits(pixel_bundle)), atol=1e-5)
    np.testing.assert_allclose(given, softmax(logits), atol=1e-6)


def over_images(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Softmax").attribute[0].i = 0


def of_small_logits(model: onnx.ModelProto) -> None:
    softmax_node = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(1e-4, np.float32), "factor"))
    model.graph.node.insert(len(model.graph.node) - 1, onnx.helper.make_node("Mul", ["logits", "factor"], ["small"]))
    softmax_node.input[0] = "small"


def logits_twice(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type = "Identity"
    del node.attribute[:]


@pytest.mark.parametrize("change", [over_images, of_small_logits, logits_twice])
def test_other_probabilities_are_seen_by_the_comparison_and_by_their_values(
    pixel_bundle: Path, change: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(pixel_bundle, tmp_path / "bundle"))
    model = onnx.load(bundle / FILE)
    change(model)
    onnx.save(model, bundle / FILE)
    edited(bundle, lambda data: None)
    failed = {check.name for check in replay(bundle, read_manifest(bundle), lambda _: None).failures}
    assert {"graph as rebuilt", "probabilities"} <= failed
    if change is over_images:
        blame = explain(bundle, read_manifest(bundle), tmp_path / "blame", lambda _: None)
        assert blame is not None
        assert "softmax" in blame.words


def test_the_server_and_triton_name_both_outputs(pixel_bundle: Path, server: Running, tmp_path: Path) -> None:
    logits = float_logits(pixel_bundle)
    pixels = golden_pixels(pixel_bundle)
    described = server.ask("GET", "/v2/models/zoo").data
    tensor = {"name": "input", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}

    def infer(**asked: Any) -> Any:
        return server.ask("POST", "/v2/models/zoo/infer", json.dumps({"inputs": [tensor], **asked}).encode())

    both, one = infer(), infer(outputs=[{"name": "logits"}])
    refused = infer(outputs=[{"name": "scores"}])
    assert [output["name"] for output in described["outputs"]] == ["probabilities", "logits"]
    found = {output["name"]: np.reshape(output["data"], output["shape"]) for output in both.data["outputs"]}
    assert list(found) == ["probabilities", "logits"]
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["probabilities"], softmax(logits), atol=1e-5)
    assert [output["name"] for output in one.data["outputs"]] == ["logits"]
    assert refused.status == 400
    assert "its outputs are 'probabilities' and 'logits'" in refused.error

    bundle = seal(pixel_bundle, read_manifest(pixel_bundle), Verdict(()))
    request = TritonRequest(repository=tmp_path / "repository", name="zoo")
    export_triton(bundle, plan_export(bundle.manifest, request))
    config = (tmp_path / "repository" / "zoo" / "config.pbtxt").read_text()
    assert re.findall(r'^  name: "(\w+)"', config, flags=re.MULTILINE)[:3] == ["input", "probabilities", "logits"]
    assert "TYPE_UINT8" in config
    (warmup,) = (tmp_path / "repository" / "zoo" / "warmup").iterdir()
    assert warmup.read_bytes() == pixels[0].tobytes()
