from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from kdexport.backends.ort import load_model
from kdexport.backends.torch_programs.torch_graph import TorchGraph
from kdexport.errors import EngineBuildError
from kdexport.graph.quantize import quantize
from kdexport.graph.tensor_ranges import calibrate
from tests.kdexport.exported_students import exported, images, small_graph, small_logits, small_weights
from tests.kdexport.graph.int8_block import CALIBRATION, SIZE, block_graph


def test_a_graph_gives_the_logits_of_an_independent_computation(tmp_path: Path) -> None:
    x = images(1, size=15)
    module = TorchGraph(onnx.load(str(small_graph(tmp_path / "a.onnx", small_weights(), size=15)))).eval()
    np.testing.assert_allclose(module(torch.from_numpy(x)).numpy(), small_logits(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["shufflenetv2"])
def test_a_student_gives_its_logits(name: str) -> None:
    student, x = exported("plain", name), torch.from_numpy(images(1))
    with torch.no_grad():
        expected = student.fused(x)
        found = TorchGraph(onnx.load(str(student.path))).eval()(x)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("kept", [(), ("inner",)])
def test_an_int8_graph_gives_the_levels_of_onnxruntime(kept: tuple[str, ...], tmp_path: Path) -> None:
    # It registers the operators of levels.
    pytest.importorskip("torchao.quantization.pt2e", reason="torchao is not installed")
    source = block_graph(tmp_path / "a.onnx")
    calibrate(source, [CALIBRATION], tmp_path / "r.json", method="minmax", percentile=99.9)
    quantize(source, tmp_path / "r.json", tmp_path / "q.onnx", form="int8-u8", keep=kept)
    x = images(1, 5, size=SIZE)
    found = TorchGraph(onnx.load(str(tmp_path / "q.onnx"))).eval()(torch.from_numpy(x)).numpy()
    expected = load_model(tmp_path / "q.onnx", optimise=False).logits(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_an_unknown_operator_is_named_with_what_it_reads(tmp_path: Path) -> None:
    model = onnx.load(str(small_graph(tmp_path / "a.onnx", small_weights())))
    model.graph.node[0].output[0] = "before"
    model.graph.node.insert(1, helper.make_node("Erf", ["before"], [model.graph.node[1].input[0]], "odd"))
    with pytest.raises(EngineBuildError, match=r"the operator Erf \(odd, which reads before\)") as caught:
        TorchGraph(model)
    assert "onnx-fp32" in caught.value.remedy
