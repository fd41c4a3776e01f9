"""Graphs that are run node by node, each node on the inputs of the trusted graph."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import AuditError
from kdexport.graph.trace import extract, run, trace
from kdexport.verify.reference import make_probes
from tests.kdexport.exported_students import images, small_graph, small_weights

SIZE = 16
PROBES = make_probes(
    np.random.default_rng(6).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8),
    Preprocessing(image_size=SIZE, resize=SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)),
)


@pytest.fixture
def exact(tmp_path: Path) -> onnx.ModelProto:
    return onnx.load(small_graph(tmp_path / "small.onnx", small_weights()))


def with_larger_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` whose convolution has weights that are 2 % larger."""
    changed = copy.deepcopy(model)
    item = next(entry for entry in changed.graph.initializer if entry.name == "conv.weight")
    values = numpy_helper.to_array(item)
    item.CopyFrom(numpy_helper.from_array((values * 1.02).astype(values.dtype), item.name))
    return changed


def test_an_error_is_not_passed_on_to_later_nodes(exact: onnx.ModelProto) -> None:
    found = trace(with_larger_weights(exact), exact, {"input": PROBES.images})
    errors = {row.node: row.error for row in found.nodes}
    assert errors["conv"] == pytest.approx(0.02, rel=0.1)
    assert max(error for name, error in errors.items() if name != "conv") < 1e-6
    worst = np.abs(found.own["c"] - found.trusted["c"]).reshape(len(PROBES.images), -1).max(axis=1)
    assert next(row.worst for row in found.nodes if row.node == "conv") == worst.argmax()


def test_an_extracted_node_gives_the_same_result_as_in_its_graph(exact: onnx.ModelProto) -> None:
    feeds = {"input": images(3, size=SIZE)}
    values = run(exact, feeds, ["r", "logits"])
    small = extract(exact, "logits", {**feeds, "r": values["r"]}, local=True)
    assert [node.op_type for node in small.graph.node] == ["GlobalAveragePool", "Flatten", "Gemm"]
    assert [item.name for item in small.graph.input] == ["r"]
    np.testing.assert_array_equal(run(small, {"r": values["r"]}, ["logits"])["logits"], values["logits"])
    whole = extract(exact, "logits", {**feeds, "r": values["r"]}, local=False)
    assert len(whole.graph.node) == 5


def test_a_graph_that_does_not_run_is_an_error(exact: onnx.ModelProto) -> None:
    with pytest.raises(AuditError, match="cannot run the graph without optimisation"):
        run(exact, {"input": images(1, size=9)[:, :2]}, ["logits"])
