from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from kdexport.backends.torch_graph import TorchGraph
from kdexport.errors import EngineBuildError
from tests.kdexport.exported_students import exported, images, small_graph, small_logits, small_weights


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


def test_an_unknown_operator_is_named_with_what_it_reads(tmp_path: Path) -> None:
    model = onnx.load(str(small_graph(tmp_path / "a.onnx", small_weights())))
    model.graph.node[0].output[0] = "before"
    model.graph.node.insert(1, helper.make_node("Erf", ["before"], [model.graph.node[1].input[0]], "odd"))
    with pytest.raises(EngineBuildError, match=r"the operator Erf \(odd, which reads before\)") as caught:
        TorchGraph(model)
    assert "onnx-fp32" in caught.value.remedy
