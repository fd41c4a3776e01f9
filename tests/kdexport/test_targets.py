import pytest

from kdexport.backends import BACKENDS, backend
from kdexport.backends.base import FORMS, PRECISIONS
from kdexport.errors import BackendUnavailableError, ConfigError, UnknownNameError
from kdexport.targets import Target, parse_target, parse_targets, require_available, target_names
from tests.kdexport.optional_packages import require_openvino


@pytest.mark.parametrize(
    ("name", "backend", "precision", "engine"),
    [
        ("onnx-fp32", "onnx", "fp32", False),
        ("trt-fp32", "trt", "fp32", True),
        ("trt-fp16", "trt", "fp16", True),
        ("trt-rtx-fp32", "trt-rtx", "fp32", True),
        ("trt-rtx-fp16", "trt-rtx", "fp16", True),
        ("onnx-int8", "onnx", "int8", False),
        ("openvino-bf16", "openvino", "bf16", False),
        ("trt-rtx-int8", "trt-rtx", "int8", True),
    ],
)
def test_a_target_is_a_backend_and_a_precision(name: str, backend: str, precision: str, engine: bool) -> None:
    target = parse_target(name)
    assert (target.backend, target.precision, target.compiles) == (backend, precision, engine)
    assert str(target) == name


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("onnx-fp32", "fp32"), ("openvino-fp16", "fp16"), ("trt-rtx-bf16", "bf16"),
        ("ncnn-fp16", "fp16"), ("ncnn-int8", "int8-s8"), ("litert-fp16", "fp16"), ("litert-int8", "int8-u8"),
        ("onnx-int8", "int8-u8"), ("openvino-int8", "int8-u8"), ("trt-int8", "int8-s8"), ("trt-rtx-int8", "int8-s8"),
    ],
)  # fmt: skip
def test_a_target_is_made_of_the_graph_that_its_runtime_executes(name: str, form: str) -> None:
    assert parse_target(name).form == form
    assert form in FORMS


def test_every_backend_has_its_precisions_by_name() -> None:
    assert len(target_names()) == sum(len(backend(name).precisions) for name in BACKENDS.names()) == 26
    for name in ("onnx", "openvino", "trt", "trt-rtx"):
        assert backend(name).precisions == PRECISIONS
    assert backend("ncnn").precisions == ("fp32", "fp16", "int8")
    assert backend("coreml").precisions == ("fp32", "fp16")
    assert backend("litert").precisions == ("fp32", "fp16", "int8")
    assert backend("executorch").precisions == ("fp32", "int8")


def test_onnxruntime_refuses_what_it_would_compute_in_another_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdexport.backends.nvidia.gpu_fingerprint", list)
    for precision, words in (("bf16", "no bfloat16 convolution"), ("fp16", "float16 graph in float32 on a CPU")):
        with pytest.raises(BackendUnavailableError, match=words) as caught:
            require_available((Target("onnx", precision),))
        assert caught.value.exit_code == 4
    assert Target("onnx", "int8").unavailable() is None
    monkeypatch.setattr("kdexport.backends.nvidia.gpu_fingerprint", lambda: ["driver", "Model: H100"])
    assert Target("onnx", "fp16").unavailable() is None


def test_openvino_refuses_a_precision_that_this_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    require_openvino()
    monkeypatch.setattr("kdexport.backends.openvino.capabilities", lambda: ("FP32", "BF16"))
    assert Target("openvino", "bf16").unavailable() is None
    with pytest.raises(
        BackendUnavailableError, match=r"OpenVINO does not compute in fp16 on this CPU, only in fp32, bf16"
    ) as caught:
        require_available((Target("openvino", "fp32"), Target("openvino", "fp16")))
    assert caught.value.exit_code == 4


def test_every_listed_target_parses_to_itself() -> None:
    names = target_names()
    assert "onnx-fp32" in names
    assert [str(parse_target(name)) for name in names] == list(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name", ["", "-", "onnx", "fp32", "onnx-", "-fp32", "onnx-fp64", "ONNX-FP32", "onnx-fp32 ", "rtx-fp16"]
)
def test_an_unknown_target_is_refused_with_all_known_ones(name: str) -> None:
    with pytest.raises(UnknownNameError, match="There is no target named") as caught:
        parse_target(name)
    for known in target_names():
        assert known in caught.value.remedy


def test_an_unknown_target_points_to_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        parse_target("tr-fp16")
    assert "Did you mean trt-fp16" in caught.value.remedy


def test_targets_keep_their_order_and_come_once() -> None:
    found = parse_targets(["trt-fp16", "onnx-fp32", "trt-fp16"])
    assert found == (Target("trt", "fp16"), Target("onnx", "fp32"))


def test_no_target_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="No target was given") as caught:
        parse_targets([])
    assert "onnx-fp32" in caught.value.remedy


def test_onnx_is_available_everywhere() -> None:
    assert Target("onnx", "fp32").unavailable() is None
    require_available((Target("onnx", "fp32"),))


@pytest.mark.parametrize("backend", ["trt", "trt-rtx", "openvino", "ncnn", "executorch", "litert", "coreml"])
def test_a_missing_package_is_told_with_the_way_to_get_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the import system would say on a machine without the packages.
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(
        BackendUnavailableError, match=f"Target {backend}-fp16 cannot be built: .* is not installed"
    ) as caught:
        require_available((Target("onnx", "fp32"), Target(backend, "fp16")))
    assert {"trt": "tensorrt"}.get(backend, f"[{backend}]") in caught.value.remedy
    assert caught.value.exit_code == 4
