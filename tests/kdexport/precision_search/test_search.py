"""Hostile ranges are found, explained and repaired; as few layers are kept as the budget needs."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kdexport.backends.ort import load_model
from kdexport.graph.equalise import apply_scalings, equalise, explain_ranges, layer_ranges
from kdexport.graph.plan import LayerPlan
from kdexport.graph.precision import cast_to_fp16
from kdexport.graph.quantize import quantize
from kdexport.graph.tensor_ranges import calibrate
from kdexport.precision_search.costs import SearchBudget, SearchImages
from kdexport.precision_search.search import Cast, PrecisionPlan, find_plan, keep_fewest
from kdexport.precision_search.sensitivity import sensitivities

CLASSES, WIDTH, SIZE = 7, 12, 12


def network(path: Path, *, hostile: float = 1.0, clip: bool = False) -> Path:
    """Conv, ReLU, depthwise conv, ReLU, conv, ReLU, pool, linear. ``hostile`` blows one channel up where the next
    layer takes it back, as a batch norm of a vanishing variance does when it is folded."""
    rng = np.random.default_rng(11)
    weights = {
        "a.weight": rng.normal(0, 0.4, (WIDTH, 3, 3, 3)),
        "a.bias": rng.normal(0, 0.3, WIDTH),
        "b.weight": rng.normal(0, 0.5, (WIDTH, 1, 3, 3)),
        "b.bias": rng.normal(0.2, 0.3, WIDTH),
        "c.weight": rng.normal(0, 0.4, (WIDTH, WIDTH, 1, 1)),
        "c.bias": rng.normal(0.1, 0.3, WIDTH),
        "linear.weight": rng.normal(0, 1.2, (CLASSES, WIDTH)),
        "linear.bias": rng.normal(0, 0.2, CLASSES),
    }
    for first, second, channel in (("a", "b", 5), ("b", "c", 2)):
        weights[f"{first}.weight"][channel] *= hostile
        weights[f"{first}.bias"][channel] *= hostile
        if second == "b":
            weights["b.weight"][channel] /= hostile
        else:
            weights["c.weight"][:, channel] /= hostile
    kind, ends = ("Clip", ["low", "high"]) if clip else ("Relu", [])
    nodes = [
        helper.make_node("Conv", ["input", "a.weight", "a.bias"], ["ao"], "a", pads=[1, 1, 1, 1]),
        helper.make_node(kind, ["ao", *ends], ["ar"], "a_relu"),
        helper.make_node("Conv", ["ar", "b.weight", "b.bias"], ["bo"], "b", group=WIDTH, pads=[1, 1, 1, 1]),
        helper.make_node(kind, ["bo", *ends], ["br"], "b_relu"),
        helper.make_node("Conv", ["br", "c.weight", "c.bias"], ["co"], "c"),
        helper.make_node("Relu", ["co"], ["cr"], "c_relu"),
        helper.make_node("GlobalAveragePool", ["cr"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "linear.weight", "linear.bias"], ["logits"], "linear", transB=1),
    ]
    stored = [numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()]
    if clip:
        stored += [numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in (("low", 0), ("high", 1e6))]
    graph = helper.make_graph(
        nodes,
        "hostile",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path


def pictures(count: int = 160) -> NDArray[np.float32]:
    """Images that differ in brightness and contrast, so that the classes do too."""
    rng = np.random.default_rng(4)
    shift, gain = rng.normal(0, 1, (count, 3, 1, 1)), rng.uniform(0.3, 1.5, (count, 1, 1, 1))
    return (shift + gain * rng.normal(0, 1, (count, 3, SIZE, SIZE))).astype(np.float32)


def int8(source: Path, folder: Path) -> Cast:
    def cast(layers: LayerPlan, path: Path) -> None:
        exact = folder / "exact.onnx"
        onnx.save(apply_scalings(onnx.load(str(source)), layers.equalised), str(exact))
        calibrate(exact, [pictures(64)], folder / "ranges.json", method="minmax", percentile=99.9)
        quantize(exact, folder / "ranges.json", path, form="int8-u8", keep=layers.nodes)

    return cast


def data(source: Path) -> SearchImages:
    return SearchImages(pictures(), load_model(source).logits(pictures()).argmax(axis=1).astype(np.int64))


def plan(source: Path, folder: Path, budget: SearchBudget, *, evaluations: int = 24) -> PrecisionPlan:
    cast = int8(source, folder)
    return find_plan(source, cast, data(source), budget, folder, form="int8-u8", evaluations=evaluations)


def test_a_tame_network_is_taken_as_it_is(tmp_path: Path) -> None:
    found = plan(network(tmp_path / "m.onnx"), tmp_path, SearchBudget(flips=0.1, top1_drop=0.1))
    assert found.chosen.layers == LayerPlan()
    assert found.evaluated == (found.chosen,)
    assert (found.collapsed, found.reasons) == (False, ())
    assert found.chosen.cost.bytes == found.chosen.path.stat().st_size
    assert found.float32.flips == found.float32.noise == 0
    assert found.chosen.cost.noise > 0


def test_a_hostile_channel_is_detected_explained_and_repaired_by_equalising(tmp_path: Path) -> None:
    source = network(tmp_path / "m.onnx", hostile=3000.0)
    found = plan(source, tmp_path, SearchBudget(flips=0.1, top1_drop=0.1))
    plain, chosen = found.evaluated[0].cost, found.chosen.cost
    assert found.collapsed
    assert plain.flips > 0.1
    assert not plain.within
    assert (chosen.kept, chosen.equalised, len(found.evaluated)) == ((), 2, 2)
    assert chosen.noise < plain.noise / 5
    assert chosen.within
    assert any(reason.startswith("a: channel 5 reaches ") and "of 8 bits" in reason for reason in found.reasons)
    assert any(reason.startswith("b: channel 2 reaches ") for reason in found.reasons)
    # What was chosen is in the file, by a run of its own.
    logits = load_model(found.chosen.path).logits(pictures())
    assert np.mean(logits.argmax(axis=1) != data(source).labels) == chosen.flips
    stored = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert stored["collapsed"] is True
    assert stored["trades"][stored["chosen"]]["flips"] == chosen.flips
    assert LayerPlan.from_json(stored) == found.chosen.layers


def test_where_nothing_can_be_equalised_the_offending_layers_are_kept_and_no_other(tmp_path: Path) -> None:
    # A Clip passes no factor on.
    source = network(tmp_path / "m.onnx", hostile=3000.0, clip=True)
    found = plan(source, tmp_path, SearchBudget(flips=0.06, top1_drop=0.06))
    assert found.chosen.within
    kept, trades = found.chosen.layers.nodes, [plan.cost for plan in found.evaluated]
    assert 0 < len(kept) < 4
    assert len([trade for trade in trades if trade.kept == kept]) == 1
    for layer in kept:
        fewer = tuple(name for name in kept if name != layer)
        assert any(trade.kept == fewer and not trade.within for trade in trades), layer
    again = plan(source, tmp_path, SearchBudget(flips=0.06, top1_drop=0.06))
    assert again.chosen.layers == found.chosen.layers
    model = onnx.load(str(found.chosen.path))
    for node in model.graph.node:
        if node.name in kept:
            assert node.input[1] == f"{node.name}.weight"


def test_a_budget_that_no_plan_keeps_is_said(tmp_path: Path) -> None:
    source = network(tmp_path / "m.onnx", hostile=3000.0, clip=True)
    found = plan(source, tmp_path, SearchBudget(flips=0.0, top1_drop=0.0), evaluations=3)
    assert not found.chosen.within
    assert len(found.evaluated) == 3


def test_noise_limits_what_changes_no_answer(tmp_path: Path) -> None:
    source = network(tmp_path / "m.onnx")
    plain = plan(source, tmp_path, SearchBudget(flips=1, top1_drop=1)).chosen.cost
    limited = plan(source, tmp_path, SearchBudget(flips=1, top1_drop=1, noise=plain.noise / 4))
    assert plain.kept == ()
    assert not limited.evaluated[0].within
    assert 0 < limited.chosen.cost.noise <= plain.noise / 4


@pytest.mark.parametrize("noise", [float("nan"), float("inf")])
def test_what_is_not_finite_is_within_no_budget(noise: float) -> None:
    assert not SearchBudget(flips=1, top1_drop=1).allows(0, 0, noise)
    assert SearchBudget(flips=1, top1_drop=1).allows(1, 1, 1e9)


def test_equalising_changes_no_logit_by_one_bit(tmp_path: Path) -> None:
    source = network(tmp_path / "m.onnx", hostile=777.0)
    found = equalise(onnx.load(str(source)), {"input": pictures(16)})
    onnx.save(found.model, str(tmp_path / "equal.onnx"))
    before, after = load_model(source, optimise=False), load_model(tmp_path / "equal.onnx", optimise=False)
    assert len(found.scalings) == 2
    assert max(abs(exponent) for scaling in found.scalings for exponent in scaling.exponents) >= 8
    assert before.logits(pictures()).tobytes() == after.logits(pictures()).tobytes()
    hostile = {item.layer: item.lost_bits for item in layer_ranges(onnx.load(str(source)), {"input": pictures(16)})}
    tame = {item.layer: item.lost_bits for item in layer_ranges(found.model, {"input": pictures(16)})}
    assert hostile["a"] > 6
    assert tame["a"] < 2
    assert hostile["b"] > 6
    assert tame["b"] < 3


@pytest.mark.parametrize("spoil", ["second reader", "shared weight", "graph output"])
def test_a_layer_that_somebody_else_reads_is_not_scaled(spoil: str, tmp_path: Path) -> None:
    model = onnx.load(str(network(tmp_path / "m.onnx", hostile=100.0)))
    if spoil == "second reader":
        model.graph.node.insert(2, helper.make_node("Identity", ["ao"], ["copy"], "copy"))
        model.graph.output.append(helper.make_tensor_value_info("copy", TensorProto.FLOAT, None))
    elif spoil == "shared weight":
        next(node for node in model.graph.node if node.name == "b").input[2] = "a.bias"
    else:
        model.graph.output.append(helper.make_tensor_value_info("ar", TensorProto.FLOAT, None))
    found = equalise(model, {"input": pictures(8)})
    assert len(found.scalings) == (0 if spoil == "shared weight" else 1)
    assert _array(found.model, "a.weight").tobytes() == _array(model, "a.weight").tobytes()


def _array(model: onnx.ModelProto, name: str) -> NDArray[np.float32]:
    values: NDArray[np.float32] = numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == name))
    return values


def test_the_layer_that_the_cast_hurts_most_is_the_most_sensitive(tmp_path: Path) -> None:
    source = network(tmp_path / "m.onnx", hostile=3000.0, clip=True)
    int8(source, tmp_path)(LayerPlan(), tmp_path / "q.onnx")
    found = sensitivities(onnx.load(str(source)), onnx.load(str(tmp_path / "q.onnx")), {"input": pictures(16)})
    assert list(found) == ["a", "b", "c", "linear"]
    # One channel of a's result and one of b's are out of proportion: what reads or writes these loses the others.
    assert min(found["a"], found["b"], found["c"]) > 5 * found["linear"] > 0


def test_a_layer_that_float16_keeps_is_computed_in_float32(tmp_path: Path) -> None:
    source = network(tmp_path / "m.onnx")
    kept = cast_to_fp16(source, tmp_path / "kept.onnx", keep=["c", "linear"])
    types = {item.name: item.data_type for item in kept.graph.initializer}
    assert {types[name] for name in ("a.weight", "a.bias", "b.weight", "b.bias")} == {TensorProto.FLOAT16}
    assert {types[name] for name in ("c.weight", "c.bias", "linear.weight", "linear.bias")} == {TensorProto.FLOAT}
    whole = cast_to_fp16(source, tmp_path / "all.onnx", keep=[node.name for node in onnx.load(str(source)).graph.node])
    assert TensorProto.FLOAT16 not in {item.data_type for item in whole.graph.initializer}
    exact = load_model(source).logits(pictures())
    assert np.abs(load_model(tmp_path / "kept.onnx").logits(pictures()) - exact).max() > 0


@dataclass(frozen=True)
class Fake:
    within: bool


def needing(needed: set[str], seen: list[tuple[str, ...]]) -> Callable[[tuple[str, ...]], Fake]:
    def evaluate(kept: tuple[str, ...]) -> Fake:
        seen.append(kept)
        return Fake(needed <= set(kept))

    return evaluate


@pytest.mark.parametrize("needed", [set(c) for n in range(4) for c in itertools.combinations("abcdef", n)])
def test_exactly_the_layers_that_are_needed_are_kept(needed: set[str]) -> None:
    seen: list[tuple[str, ...]] = []
    found = keep_fewest("abcdef", needing(needed, seen), max_evaluations=40)
    assert set(found.kept) == needed
    assert found.result.within
    assert len(seen) == len(set(seen)) == len(found.evaluations)
    assert len(seen) <= 4 + 3 + 6


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_the_number_of_trials_is_bounded(most: int) -> None:
    seen: list[tuple[str, ...]] = []
    found = keep_fewest([str(i) for i in range(64)], needing({"40", "63"}, seen), max_evaluations=most)
    assert len(seen) == most
    assert not found.result.within


def test_layers_of_equal_channels_are_not_called_hostile(tmp_path: Path) -> None:
    ranges = layer_ranges(onnx.load(str(network(tmp_path / "m.onnx"))), {"input": pictures(16)})
    assert explain_ranges(ranges) == []
    assert [item.layer for item in ranges] == ["a", "b", "c"]
    values = pictures(16)
    assert ranges[0].widest > ranges[0].median > 0
    assert np.isfinite(values).all()
