"""A graph that gives probabilities keeps its logits, and is the same graph when the softmax is taken away."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kdexport.backends.file_interface import FileInterface
from kdexport.backends.openvino import load_openvino
from kdexport.backends.ort import load_model
from kdexport.data.preprocessing import Preprocessing
from kdexport.graph.audit import audit_graph
from kdexport.graph.equality import graph_difference
from kdexport.graph.interface import with_interface, without_interface
from kdexport.graph.precision import cast_to_fp16
from tests.kdexport.graph.int8_block import SIZE, block_graph, block_weights
from tests.kdexport.optional_packages import require_openvino

PREPROCESSING = Preprocessing(image_size=SIZE, resize=SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
BOTH = FileInterface("uint8-nhwc", "probabilities")


def images() -> "np.typing.NDArray[np.float32]":
    return np.random.default_rng(3).normal(0, 2, (5, 3, SIZE, SIZE)).astype(np.float32)


def test_probabilities_are_the_softmax_of_the_unchanged_logits(tmp_path: Path) -> None:
    plain = block_graph(tmp_path / "plain.onnx")
    onnx.save(
        with_interface(onnx.load(plain), FileInterface(gives="probabilities"), PREPROCESSING), tmp_path / "p.onnx"
    )
    expected = load_model(plain).logits(images())
    model = load_model(tmp_path / "p.onnx")
    np.testing.assert_array_equal(model.logits(images()), expected)
    given, logits = model.outputs(images(), ["probabilities", "logits"])
    np.testing.assert_array_equal(logits, expected)
    by_hand = [[1 / sum(np.exp(np.float64(z) - np.float64(y)) for z in row) for y in row] for row in expected]
    np.testing.assert_allclose(given, by_hand, rtol=1e-5, atol=1e-7)
    assert [item.name for item in model.session.get_outputs()] == ["probabilities", "logits"]


def test_openvino_gives_both_outputs(tmp_path: Path) -> None:
    require_openvino()
    plain = block_graph(tmp_path / "plain.onnx")
    onnx.save(
        with_interface(onnx.load(plain), FileInterface(gives="probabilities"), PREPROCESSING), tmp_path / "p.onnx"
    )
    model = load_openvino(tmp_path / "p.onnx", precision="fp32", threads=1)
    given, logits = model.outputs(images(), ["probabilities", "logits"])
    np.testing.assert_allclose(logits, load_model(plain).logits(images()), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.logits(images()), logits)
    np.testing.assert_allclose(given.sum(1), 1, atol=1e-5)
    assert (given.argmax(1) == logits.argmax(1)).all()


def test_taking_the_interface_away_gives_the_graph_back(tmp_path: Path) -> None:
    plain = onnx.load(block_graph(tmp_path / "plain.onnx"))
    for interface in (BOTH, FileInterface(gives="probabilities"), FileInterface("uint8-nchw"), FileInterface()):
        dressed = with_interface(plain, interface, PREPROCESSING)
        assert bool(graph_difference(dressed, plain)) == (interface != FileInterface())
        assert graph_difference(without_interface(dressed), plain) == ""


def test_the_audit_reads_through_the_softmax_and_refuses_another_interface(tmp_path: Path) -> None:
    plain, half = block_graph(tmp_path / "plain.onnx"), tmp_path / "half.onnx"
    cast_to_fp16(plain, half)
    for path, form in ((plain, "fp32"), (half, "fp16")):
        dressed = tmp_path / "dressed.onnx"
        onnx.save(with_interface(onnx.load(path), BOTH, PREPROCESSING), dressed)
        findings = audit_graph(dressed, block_weights(), form=form, opset=20, interface=BOTH)
        assert [finding for finding in findings if not finding.holds] == []
        for other in (FileInterface(), FileInterface("uint8-nhwc"), FileInterface("uint8-nchw", "probabilities")):
            refused = audit_graph(dressed, block_weights(), form=form, opset=20, interface=other)
            assert [f.check.partition(" ")[0] for f in refused if not f.holds] == ["dynamic"]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_probabilities_of_another_type_are_refused(kind: int, tmp_path: Path) -> None:
    model = with_interface(
        onnx.load(block_graph(tmp_path / "plain.onnx")), FileInterface(gives="probabilities"), PREPROCESSING
    )
    (node,) = [node for node in model.graph.node if node.op_type == "Softmax"]
    node.output[0] = "wide"
    model.graph.node.append(helper.make_node("Cast", ["wide"], ["probabilities"], to=kind))
    model.graph.output[0].type.tensor_type.elem_type = kind
    onnx.save(model, tmp_path / "other.onnx")
    findings = audit_graph(
        tmp_path / "other.onnx", block_weights(), form="fp32", opset=20, interface=FileInterface(gives="probabilities")
    )
    assert [finding.check for finding in findings if not finding.holds]
