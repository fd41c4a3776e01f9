from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from kdexport.backends.epcontext import provider_tensorrt_major, require_servable, wrap_plan, write_context
from kdexport.backends.ort import import_onnxruntime
from kdexport.errors import AuditError, BackendUnavailableError, BundleError


def written(tmp_path: Path, backend: str = "trt") -> onnx.ModelProto:
    (tmp_path / "model.plan").write_bytes(b"plan")
    return write_context(
        tmp_path / "model.plan",
        tmp_path / "served.onnx",
        backend=backend,
        image_size=24,
        classes=7,
        built_with="10.16.1.11",
    )


@pytest.mark.parametrize(
    ("backend", "source"), [("trt", "TensorrtExecutionProvider"), ("trt-rtx", "NvTensorRTRTXExecutionProvider")]
)
def test_the_model_is_one_node_that_names_the_plan_beside_it(tmp_path: Path, backend: str, source: str) -> None:
    written(tmp_path, backend)
    model = onnx.load(str(tmp_path / "served.onnx"))
    onnx.checker.check_model(model)
    (node,) = model.graph.node
    facts = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    assert (node.op_type, node.domain) == ("EPContext", "com.microsoft")
    assert facts == {
        "main_context": 1,
        "embed_mode": 0,
        "ep_cache_context": b"model.plan",
        "ep_sdk_version": b"10.16.1.11",
        "source": source.encode(),
    }
    ends = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.output)}
    shapes = {name: [d.dim_param or d.dim_value for d in kind.shape.dim] for name, kind in ends.items()}
    assert shapes == {"input": ["batch", 3, 24, 24], "logits": ["batch", 7]}
    assert {kind.elem_type for kind in ends.values()} == {TensorProto.FLOAT}
    assert (tmp_path / "model.plan").read_bytes() == b"plan"


def test_onnxruntime_reads_the_node_and_wants_the_provider_that_it_names(tmp_path: Path) -> None:
    written(tmp_path)
    ort = import_onnxruntime()
    with pytest.raises(Exception, match=r"EPContext") as caught:
        ort.InferenceSession(str(tmp_path / "served.onnx"), providers=["CPUExecutionProvider"])
    assert "NOT_IMPLEMENTED" in str(caught.value) or "NotImplemented" in type(caught.value).__name__


def test_a_plan_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(BundleError, match="different folders"):
        write_context(
            tmp_path / "other" / "model.plan", tmp_path / "served.onnx", backend="trt", image_size=8, classes=2,
            built_with="10.1",
        )  # fmt: skip


def test_the_version_rule_is_checked_and_explained() -> None:
    require_servable("10.16.1.11", 10)
    with pytest.raises(
        AuditError, match=r"built with TensorRT 11\.4\.0\.106, but onnxruntime's provider loads TensorRT 10"
    ):
        require_servable("11.4.0.106", 10)
    with pytest.raises(BackendUnavailableError, match="no TensorRT provider") as caught:
        require_servable("10.16.1.11", None)
    assert caught.value.exit_code == 4


def test_the_version_is_read_from_the_provider_that_is_installed() -> None:
    ort = import_onnxruntime()
    if "TensorrtExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no TensorRT provider")
    assert provider_tensorrt_major() in (10, 11)


@pytest.mark.parametrize(("major", "there"), [(10, True), (11, False), (None, False)])
def test_a_plan_is_wrapped_only_where_onnxruntime_could_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, major: int | None, there: bool
) -> None:
    monkeypatch.setattr("kdexport.backends.epcontext.provider_tensorrt_major", lambda: major)
    (tmp_path / "model.plan").write_bytes(b"plan")
    reason = wrap_plan(tmp_path, built_with="10.16.1.11", image_size=8, classes=3)
    assert (tmp_path / "served.onnx").is_file() is there
    assert bool(reason) is not there
