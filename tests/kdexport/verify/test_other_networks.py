"""The ladder on networks with attention, gates, norms and resizing: what is correct passes, and faults are found."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import fx, nn

from kdexport.backends.base import Finding
from kdexport.backends.openvino import capabilities, load_openvino, runtime_types
from kdexport.backends.ort import integer_kernels, load_model
from kdexport.graph.audit import audit_graph
from kdexport.graph.plan import Kept, LayerPlan
from kdexport.graph.precision import cast_to_bf16, cast_to_fp16, emulate_bf16
from kdexport.graph.quantize import parse_form, quantize
from kdexport.graph.tensor_ranges import Range, calibrate
from kdexport.reparam.expected import structure_of
from kdexport.verify.parity import rung_b, rung_c
from kdexport.verify.policy import Fp32Policy, LowPolicy
from kdexport.verify.reference import Probes, Reference, make_probes, make_reference, run_torch
from tests.kdexport.optional_packages import require_openvino
from tests.kdexport.other_networks import (
    PREPROCESSING,
    Averaged,
    Gated,
    Resized,
    TokenMean,
    Transformer,
    folded_file,
    pictures,
)

FORMS = ("fp16", "bf16", "int8-u8", "int8-s8")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Exported:
    """A network of another origin in all forms, and what they are compared with."""

    folder: Path
    graph: fx.GraphModule
    fused: nn.Module
    probes: Probes
    reference: Reference
    ranges: dict[str, Range]

    def file(self, form: str) -> Path:
        return self.folder / f"{form}.onnx"

    def audit(self, path: Path, form: str, kept: tuple[str, ...] = ()) -> list[Finding]:
        weights = {name: value.numpy() for name, value in self.fused.state_dict().items()}
        structure = structure_of(self.fused)
        return audit_graph(path, weights, form=form, opset=20, structure=structure, ranges=self.ranges, kept=kept)


def _exported(network: nn.Module, folder: Path) -> Exported:
    graph, fused = folded_file(network, folder / "fp32.onnx")
    probes = make_probes(pictures(20, 1), PREPROCESSING)
    ranges = calibrate(
        folder / "fp32.onnx",
        [PREPROCESSING.normalise(np.concatenate([pictures(200, 2), pictures(20, 1)]))],
        folder / "ranges.json",
        method="minmax",
        percentile=99.9,
    )
    cast_to_fp16(folder / "fp32.onnx", folder / "fp16.onnx")
    cast_to_bf16(folder / "fp32.onnx", folder / "bf16.onnx")
    for form in FORMS[2:]:
        quantize(folder / "fp32.onnx", folder / "ranges.json", folder / f"{form}.onnx", form=parse_form(form))
    reference = make_reference(graph, fused, probes, forms=FORMS)
    return Exported(folder=folder, graph=graph, fused=fused, probes=probes, reference=reference, ranges=ranges)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[nn.Module]], Exported]:
    made: dict[type[nn.Module], Exported] = {}

    def give(network: type[nn.Module]) -> Exported:
        if network not in made:
            made[network] = _exported(network(), tmp_path_factory.mktemp(network.__name__))
        return made[network]

    return give


Give = Callable[[type[nn.Module]], Exported]
NETWORKS = (Transformer, TokenMean, Gated, Resized)


@pytest.mark.parametrize("form", ["fp32", *FORMS])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_correct_file_passes_its_audit_and_its_rung(exported: Give, network: type[nn.Module], form: str) -> None:
    given = exported(network)
    path = given.file(form)
    assert [finding for finding in given.audit(path, form) if not finding.holds] == []
    emulated = form == "bf16"
    model = load_model(path, content=emulate_bf16(path), optimise=False) if emulated else load_model(path)
    logits = model.logits(given.probes.images)
    if form == "fp32":
        checks = rung_b("file", logits, given.reference, given.probes, Fp32Policy())
    else:
        checks = rung_c("file", logits, given.reference, given.probes, form=form, policy=LowPolicy())
    assert [check for check in checks if not check.holds] == []


@pytest.mark.parametrize("network", NETWORKS)
def test_every_layer_with_weights_runs_in_integers(exported: Give, network: type[nn.Module]) -> None:
    found = integer_kernels(exported(network).file("int8-u8"), 0)
    assert found.holds, found.fact


@pytest.mark.parametrize("form", ["int8-u8", "int8-s8"])
def test_the_audit_says_how_many_products_of_activations_are_float32(exported: Give, form: str) -> None:
    given = exported(Transformer)
    facts = [item.fact for item in given.audit(given.file(form), form) if item.check == f"precision {form}"]
    # A convolution, four products and a linear layer have weights; queries by keys and shares by values have none.
    assert facts == ["6 layers read int8 inputs and int8 weights, 2 products of activations are computed in float32"]


@pytest.mark.parametrize("form", ["int8-u8", "int8-s8"])
def test_a_bias_after_a_product_is_stored_in_float32(exported: Give, form: str) -> None:
    given = exported(Transformer)
    stored = {item.name: numpy_helper.to_array(item) for item in onnx.load(str(given.file(form))).graph.initializer}
    assert np.array_equal(stored["block.qkv.bias"], given.fused.state_dict()["block.qkv.bias"].numpy())
    assert np.array_equal(stored["positions"], given.fused.state_dict()["positions"].numpy())


@pytest.mark.parametrize("form", ["fp32", "int8-u8", "int8-s8"])
@pytest.mark.parametrize("name", ["block.qkv.weight", "block.down.bias", "head.weight"])
def test_a_changed_weight_is_found_in_a_transformer(exported: Give, form: str, name: str, tmp_path: Path) -> None:
    given = exported(Transformer)
    model = onnx.load(str(given.file(form)))
    changed = 0
    for item in model.graph.initializer:
        if item.name.startswith(name) and not item.name.endswith(("scale", "zero_point")):
            values = numpy_helper.to_array(item).copy()
            values.flat[5] = -3 if values.flat[5] >= 0 else 3
            item.CopyFrom(numpy_helper.from_array(values, item.name))
            changed += 1
    assert changed == 1
    onnx.save(model, str(tmp_path / "changed.onnx"))
    wrong = [finding.check for finding in given.audit(tmp_path / "changed.onnx", form) if not finding.holds]
    assert "weights" in wrong


def test_a_plan_keeps_a_product_with_a_weight_in_float32(exported: Give, tmp_path: Path) -> None:
    given = exported(Transformer)
    node = next(node for node in onnx.load(str(given.file("fp32"))).graph.node if "block.up.weight.T" in node.input)
    plan = LayerPlan(kept=(Kept(node.name, "block.up.weight.T"),))
    assert plan.weights == ("block.up.weight",)
    weights = {name: value.numpy() for name, value in given.fused.state_dict().items()}
    assert plan.scaled(weights).keys() == weights.keys()
    path = tmp_path / "kept.onnx"
    quantize(given.file("fp32"), given.folder / "ranges.json", path, form="int8-u8", keep=plan.nodes)
    assert [finding for finding in given.audit(path, "int8-u8", plan.nodes) if not finding.holds] == []
    assert integer_kernels(path, 1).holds


def test_openvino_rounds_the_mean_over_tokens_as_the_file_says(exported: Give, tmp_path: Path) -> None:
    require_openvino()
    if "INT8" not in capabilities():
        pytest.skip("this CPU does not compute in int8 in OpenVINO")
    given, path = exported(TokenMean), tmp_path / "int8.onnx"
    # With 8 bits OpenVINO's sums saturate on processors without VNNI, which is why 7 are the default.
    quantize(given.file("fp32"), given.folder / "ranges.json", path, form="int8-u8", weight_bits=7)
    reference = make_reference(given.graph, given.fused, given.probes, forms=("int8-u8",), weight_bits=7)
    model = load_openvino(path, precision="int8")
    assert runtime_types(model, "int8", set()).holds
    logits = model.logits(given.probes.images)
    checks = rung_c("file", logits, reference, given.probes, form="int8-u8", policy=LowPolicy())
    assert [check for check in checks if not check.holds] == []


def test_layers_that_share_weights_read_int8_weights_of_their_own(exported: Give) -> None:
    given = exported(Resized)
    for form in FORMS[2:]:
        model = onnx.load(str(given.file(form)))
        stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
        reads = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
        weights = [name for name in reads if name in stored and stored[name].dtype == np.int8]
        assert len(weights) == len(set(weights))
        shared = [stored[name] for name in weights if name.startswith("shared.weight")]
        first, second = shared
        np.testing.assert_array_equal(first, second)
        outputs = {node.output[0] for node in model.graph.node if node.input[0] in weights}
        readers = [name for node in model.graph.node for name in node.input if name in outputs]
        assert sorted(readers) == sorted(outputs)


def _sum_in_order(graph: fx.GraphModule, images: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> torch.Tensor:
    """``Averaged`` in float32 with a mean that adds one pixel after the other."""
    weights = graph.state_dict()

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1).relu()

    x = conv(torch.max_pool2d(conv(torch.from_numpy(images), "first"), 2), "second").flatten(2)
    total = torch.zeros(x.shape[:2])
    for pixel in range(x.shape[2]):
        total = total + x[..., pixel]
    return nn.functional.linear(total / x.shape[2], weights["head.weight"], weights["head.bias"])


def test_a_sum_over_pixels_in_their_order_is_a_correct_float32_computation(exported: Give) -> None:
    given = exported(Averaged)
    with torch.no_grad():
        logits = _sum_in_order(given.graph, given.probes.images).numpy()
    checks = rung_b("in order", logits, given.reference, given.probes, Fp32Policy())
    assert [check for check in checks if not check.holds] == []


def test_a_weight_that_is_slightly_wrong_is_found_after_a_mean_over_pixels(exported: Give) -> None:
    given = exported(Averaged)
    wrong = seeded_copy(given.graph)
    with torch.no_grad():
        wrong.get_parameter("second.weight").mul_(1 + 1e-5)
    logits = run_torch(wrong, given.probes.images).astype(np.float32)
    checks = rung_b("wrong", logits, given.reference, given.probes, Fp32Policy())
    assert not any(check.holds for check in checks)


def seeded_copy(graph: fx.GraphModule) -> fx.GraphModule:
    fresh = fx.GraphModule(graph, graph.graph)
    for name, value in graph.named_parameters():
        holder, _, last = name.rpartition(".")
        setattr(fresh.get_submodule(holder), last, nn.Parameter(value.detach().clone(), requires_grad=False))
    return fresh
