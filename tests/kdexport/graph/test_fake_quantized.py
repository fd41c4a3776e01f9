"""The int8 graph that is trained: its levels, its gradients, and the file that is cast from what was trained."""

from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor

from kdexport.backends.ort import load_model
from kdexport.errors import AuditError, ReparamError
from kdexport.graph.fake_quantized import FakeQuantized, _round, _TrainedRange
from kdexport.graph.quantize import FORMS, Form, quantize
from kdexport.graph.tensor_ranges import Range, calibrate, read_ranges
from kdexport.graph.trained_weights import with_weights
from tests.kdexport.exported_students import images
from tests.kdexport.graph.int8_block import CALIBRATION, SIZE, block_graph, block_tensors

PROBES = images(16, 12, size=SIZE)


def cast_block(folder: Path, form: Form, bits: int = 8) -> tuple[onnx.ModelProto, onnx.ModelProto, dict[str, Range]]:
    """The int8 graph of the block, the float32 one and its ranges."""
    plain = block_graph(folder / "plain.onnx")
    calibrate(plain, [CALIBRATION], folder / "ranges.json", method="minmax", percentile=99.99)
    quantized = quantize(plain, folder / "ranges.json", folder / f"{form}.onnx", form=form, weight_bits=bits)
    return quantized, onnx.load(str(plain)), read_ranges(folder / "ranges.json")


def block(folder: Path, form: Form, bits: int = 8) -> FakeQuantized:
    return FakeQuantized(*cast_block(folder, form, bits), weight_bits=bits)


def logits_of(graph: FakeQuantized, x: NDArray[np.float32] = PROBES) -> NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(graph(torch.from_numpy(x)))


def trained(graph: FakeQuantized, steps: int = 5) -> list[float]:
    """Train on logits that the block does not have; returns the losses."""
    wanted = torch.from_numpy(block_tensors(PROBES, None)["logits"].numpy()).float().flip(1)
    optimiser = torch.optim.AdamW(graph.parameters(), lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = (graph(torch.from_numpy(PROBES)) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("form", FORMS)
def test_before_training_it_is_the_block_rounded_layer_by_layer_in_float64(form: Form, tmp_path: Path) -> None:
    expected = block_tensors(PROBES, form)["logits"].numpy()
    spread = np.abs(expected - block_tensors(PROBES, None)["logits"].numpy()).max()
    # A tie may be broken the other way in float32: one level, of 255.
    assert np.abs(logits_of(block(tmp_path, form)) - expected).max() <= 0.3 * spread


@pytest.mark.parametrize(("form", "bits"), [("int8-u8", 7), ("int8-u8", 8), ("int8-s8", 8)])
def test_what_was_trained_is_what_the_file_computes(form: Form, bits: int, tmp_path: Path) -> None:
    quantized, plain, ranges = cast_block(tmp_path, form, bits)
    graph = FakeQuantized(quantized, plain, ranges, weight_bits=bits)
    before = logits_of(graph)
    losses = trained(graph)
    assert losses[-1] < 0.9 * losses[0]
    after = logits_of(graph)
    assert np.abs(after - before).max() > 0.05
    onnx.save(with_weights(plain, graph.trained_weights()), str(tmp_path / "trained.onnx"))
    found = {**ranges, **graph.trained_ranges()}
    assert any(found[name] != ranges[name] for name in ranges)
    text = "{" + ", ".join(f'"{name}": [{r.low!r}, {r.high!r}]' for name, r in found.items()) + "}"
    (tmp_path / "trained.json").write_text(text)
    path = tmp_path / "file.onnx"
    again = quantize(tmp_path / "trained.onnx", tmp_path / "trained.json", path, form=form, weight_bits=bits)
    # Made again from what was stored, the scales and levels are those of the file, and the logits have the same bits.
    remade = FakeQuantized(again, onnx.load(str(tmp_path / "trained.onnx")), found, weight_bits=bits)
    assert np.array_equal(logits_of(remade), after)
    ran = load_model(path, optimise=form != "int8-s8").logits(PROBES)
    assert np.abs(ran - after).max() <= 0.02 * np.abs(after).max()


def test_an_end_of_a_range_at_zero_stays_there_and_no_end_moves_outwards(tmp_path: Path) -> None:
    graph = block(tmp_path, "int8-u8")
    before = graph.trained_ranges()
    with torch.no_grad():
        for module in graph.ranges.values():
            module.get_parameter("change").copy_(torch.tensor([0.3, -0.05]))
    after = graph.trained_ranges()
    assert before["x"].low == after["x"].low == 0.0
    for name, found in before.items():
        assert after[name].low == found.low
        assert after[name].high == pytest.approx(found.high * np.exp(-0.5))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_inside_of_a_range_and_move_its_end_outside(form: Form, tmp_path: Path) -> None:
    graph = block(tmp_path, form)
    ends = graph.trained_ranges()["input"]
    module = next(m for m in graph.ranges.values() if m.tensor == "input")
    values = torch.tensor([0.25 * ends.high, 3 * ends.high, 4 * ends.high, 0.3 * ends.low], requires_grad=True)
    seen = _rounded_by(graph, values)
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    (seen * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0, 0.0, 1000.0]
    top = max(-ends.low, ends.high) if form == "int8-s8" else ends.high
    assert seen[1].item() == pytest.approx(top, abs=(ends.high - ends.low) / 255)
    # A small move of the upper end moves the two values beyond it as much; the two inside move by a part of a step.
    change = module.get_parameter("change").grad
    assert change is not None
    moved = change[1].item() / (10 * ends.high) if ends.high >= -ends.low or form == "int8-u8" else change[0].item()
    assert form == "int8-s8" or moved == pytest.approx(110, abs=1000 / 255)


def _rounded_by(graph: FakeQuantized, values: Tensor) -> Tensor:
    found = (cast(_TrainedRange, module) for module in graph.ranges.values())
    return _round(values, next(module for module in found if module.tensor == "input").ends())


def test_other_ranges_and_other_weights_than_those_of_the_file_are_named(tmp_path: Path) -> None:
    quantized, plain, ranges = cast_block(tmp_path, "int8-u8")
    wider = {**ranges, "x": Range(ranges["x"].low, ranges["x"].high * 1.001)}
    with pytest.raises(AuditError, match=r"was not cast with these weights and ranges: x_scale is .* expected"):
        FakeQuantized(quantized, plain, wider, weight_bits=8)
    item = next(item for item in plain.graph.initializer if item.name == "inner.weight")
    values = numpy_helper.to_array(item).copy()
    values[2, 3] *= 1.5
    item.CopyFrom(numpy_helper.from_array(values, item.name))
    with pytest.raises(AuditError, match=r"the levels of inner\.weight differ \(1 differences\)"):
        FakeQuantized(quantized, plain, ranges, weight_bits=8)
    with pytest.raises(AuditError, match=r"the levels of \w+\.weight differ \(3 differences\)"):
        FakeQuantized(quantized, block_model(tmp_path), ranges, weight_bits=7)


def block_model(folder: Path) -> onnx.ModelProto:
    return onnx.load(str(block_graph(folder / "again.onnx")))


def test_an_operator_without_a_gradient_is_named_with_its_node(tmp_path: Path) -> None:
    quantized, plain, ranges = cast_block(tmp_path, "int8-u8")
    quantized.graph.node.append(helper.make_node("Det", ["logits"], ["d"], "determinant"))
    with pytest.raises(ReparamError, match=r"has the operator Det \(determinant\), which has no gradient"):
        FakeQuantized(quantized, plain, ranges, weight_bits=8)
