"""Every student as an ONNX file: folded from branches at every stage, it is the plain student's graph."""

import copy

import numpy as np
import onnx
import pytest
import torch

from kdexport.backends.ort import load_model
from kdexport.graph.audit import audit_graph, operator_counts
from kdexport.reparam.blocks import attach_branches
from kdexport.reparam.fold_student import fuse_student
from kdexport.students import STUDENTS
from tests.kdexport.exported_students import MULTI, OPSET, exported, exported_fp16, images, unfused
from tests.kdexport.hostile_values import relative_difference
from tests.kdexport.students.published_facts import FACTS

every_student = pytest.mark.parametrize("name", STUDENTS.names())


@every_student
def test_the_graph_is_that_of_the_plain_student(name: str) -> None:
    plain, multi = (operator_counts(onnx.load(str(exported(variant, name).path))) for variant in ("plain", "multi"))
    assert multi == plain
    # No shape is computed at run time: all dimensions but the batch are constants.
    assert not plain.keys() & {"BatchNormalization", "Shape", "Gather", "Cast", "Identity"}
    assert plain["Conv"] == FACTS[name, 32].convs
    # A weight and a bias each; the classifier, and what lies before it, are the only other layers.
    layers = sum(values.ndim > 1 for values in exported("plain", name).weights.values())
    assert plain["Conv"] + plain["Gemm"] == layers
    assert plain["Gemm"] == (2 if name == "mobilenetv3" else 1)


@every_student
@pytest.mark.parametrize("batch", [1, 5])
def test_onnxruntime_computes_the_student_before_its_branches_were_folded(name: str, batch: int) -> None:
    x = images(batch, seed=batch)
    with torch.no_grad():
        exact = copy.deepcopy(unfused("multi", name)).double()(torch.from_numpy(x).double())
        eager = unfused("multi", name)(torch.from_numpy(x))
    got = torch.from_numpy(load_model(exported("multi", name).path).logits(x))
    # The folded student may differ by a few more roundings than the branches.
    assert relative_difference(got, exact) <= max(5e-6, 3 * relative_difference(eager, exact))


@every_student
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_audit_finds_no_fault(name: str, precision: str) -> None:
    path = exported("multi", name).path if precision == "fp32" else exported_fp16("multi", name)
    findings = audit_graph(path, exported("multi", name).weights, form=precision, opset=OPSET)
    assert [finding for finding in findings if not finding.holds] == []


@every_student
def test_the_audit_finds_an_extra_layer(name: str) -> None:
    weights = dict(exported("multi", name).weights)
    del weights[next(key for key, values in reversed(weights.items()) if values.ndim == 4)]
    findings = audit_graph(exported("multi", name).path, weights, form="fp32", opset=OPSET)
    assert [finding.check for finding in findings if not finding.holds] == ["no branch"]


@every_student
def test_the_float16_file_is_as_near_as_its_precision_allows(name: str) -> None:
    x = images(4, seed=9)
    exact = load_model(exported("multi", name).path).logits(x)
    got = load_model(exported_fp16("multi", name)).logits(x)
    assert got.dtype == np.float32
    assert 0 < np.abs(got - exact).max() <= 0.02 * np.abs(exact).max()


# The others have one class for both forms.
@pytest.mark.parametrize("name", ["mobilenetv2", "resnet18", "shufflenetv2"])
def test_the_imagenet_form_is_traced_with_a_free_batch(name: str) -> None:
    net = STUDENTS.build(name, num_classes=7, image_size=224)
    attach_branches(net, MULTI)
    merged = fuse_student(net.eval(), input_shape=(2, 3, 65, 43)).module
    free = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(merged, (torch.zeros(2, 3, 224, 224),), dynamic_shapes=free)
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in operators if "batch_norm" in target]
    assert sum("conv2d" in target for target in operators) == FACTS[name, 224].convs
