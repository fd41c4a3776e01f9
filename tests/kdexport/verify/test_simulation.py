"""Simulations of low precisions, each written out again layer by layer for the small network."""

import copy
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kdexport.backends.ort import load_model
from kdexport.graph.plan import Kept, LayerPlan
from kdexport.graph.precision import cast_to_bf16, emulate_bf16
from kdexport.graph.tensor_ranges import Method
from kdexport.verify.parity import rung_c
from kdexport.verify.policy import LowPolicy
from kdexport.verify.simulation import EXTREMES, Simulation
from tests.kdexport.exported_students import images, small_graph, small_weights
from tests.kdexport.verify.small_ladder import Ladder


def weight_levels(weight: Tensor, top: int) -> Tensor:
    """Each output channel on its own grid of 2 * top + 1 levels."""
    rows = []
    for row in weight:
        step = row.abs().max() / top
        rows.append(torch.round(row / step) * step)
    return torch.stack(rows)


def grid(x: Tensor, form: str) -> Tensor:
    values = x.numpy().astype(np.float64)
    if form == "int8-s8":
        step = np.abs(values).max() / 127
        rounded = np.rint(values / step) * step
    else:
        low, high = min(values.min(), 0.0), max(values.max(), 0.0)
        step = (high - low) / 255
        zero = np.rint(-low / step)
        rounded = (np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step
    return torch.from_numpy(rounded.astype(np.float32))


def by_layers(ladder: Ladder, form: str, bits: int, kept: tuple[str, ...] = ()) -> NDArray[np.float64]:
    """SmallNet folded, with the roundings of int8 written out; layers of ``kept`` stay float32."""
    w = {
        name: weight_levels(value, 2 ** (bits - 1) - 1)
        if value.dim() > 1 and name.removesuffix(".weight") not in kept
        else value
        for name, value in ladder.fused.state_dict().items()
    }

    def put(x: Tensor, layer: str, *, exact: bool) -> Tensor:
        return x if layer in kept and (exact or form == "int8-s8") else grid(x, form)

    def both(x: Tensor, *, exact: bool) -> Tensor:
        return x if exact or form == "int8-s8" else grid(x, form)

    stem, inner = "stem" in kept, "stem" in kept and "inner" in kept
    x = torch.from_numpy(ladder.probes.images[: ladder.probes.real])
    x = functional.conv2d(put(x, "stem", exact=True), w["stem.weight"], w["stem.bias"], stride=2, padding=1).relu()
    y = functional.conv2d(put(x, "inner", exact=stem), w["inner.weight"], w["inner.bias"], padding=1, groups=2)
    x = (both(x, exact=inner) + both(y, exact=inner)).relu()
    x = both(x, exact=inner).mean((2, 3))
    logits = functional.linear(put(x, "linear", exact=inner), w["linear.weight"], w["linear.bias"])
    return both(logits, exact="linear" in kept).double().numpy()


@pytest.mark.parametrize("form", ["int8-u8", "int8-s8"])
@pytest.mark.parametrize("bits", [7, 8])
def test_the_int8_simulation_is_the_one_written_out_by_layers(ladder: Ladder, form: str, bits: int) -> None:
    with torch.no_grad():
        expected = by_layers(ladder, form, bits)
        x = torch.from_numpy(ladder.probes.images[: ladder.probes.real])
        got = Simulation(ladder.fused, form, weight_bits=bits)(x).double().numpy()
    exact = ladder.reference.exact[: ladder.probes.real]
    noise = np.sqrt(np.mean((expected - exact) ** 2))
    assert 1e-3 < noise / np.abs(exact).max() < 0.2
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.3 * noise


@pytest.mark.parametrize("form", ["int8-u8", "int8-s8"])
@pytest.mark.parametrize(
    ("method", "percentile", "better", "reach"), [("percentile", 99.9, 4, 5), ("entropy", 100, 1.2, 500)]
)
def test_values_beyond_the_range_of_the_method_become_its_ends(
    form: str, method: Method, percentile: float, better: float, reach: float
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 8, bias=False)
    x = torch.randn(64, 512)
    # Two values of 32,768: less than a thousandth of each side.
    x[3, 7], x[5, 11] = 900.0, -700.0
    with torch.no_grad():
        exact = layer(x).double()
        cut, wide = (Simulation(layer, form, ranges=own)(x).double() for own in ((method, percentile), EXTREMES))
    others = [row for row in range(64) if row not in (3, 5)]
    near, far = ((found - exact)[others].square().mean().sqrt() for found in (cut, wide))
    # A level of the wide range is as large as the values themselves.
    assert better * near < far
    for row, place in ((3, 7), (5, 11)):
        lost = ((cut - exact)[row] / layer.weight[:, place]).abs().mean()
        assert abs(x[row, place]) - reach < lost < abs(x[row, place])


@pytest.mark.parametrize("form", ["int8-u8", "int8-s8"])
@pytest.mark.parametrize("kept", [("stem",), ("inner",), ("linear",), ("stem", "inner"), ("inner", "linear")])
def test_layers_that_a_plan_keeps_are_float32_and_so_is_what_lies_between_them(
    ladder: Ladder, form: str, kept: tuple[str, ...]
) -> None:
    plan = LayerPlan(kept=tuple(Kept(name, f"{name}.weight") for name in kept))
    x = torch.from_numpy(ladder.probes.images[: ladder.probes.real])
    with torch.no_grad():
        expected, plain = by_layers(ladder, form, 7, kept), by_layers(ladder, form, 7)
        got = Simulation(ladder.fused, form, weight_bits=7, plan=plan)(x).double().numpy()
    noise = np.sqrt(np.mean((expected - ladder.reference.exact[: len(x)]) ** 2))
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.1 * noise
    assert np.sqrt(np.mean((expected - plain) ** 2)) > 0.3 * noise
    assert not hasattr(x, "_kdexport_exact")


def test_the_reference_simulates_int8_on_real_images_and_bf16_on_all(ladder: Ladder) -> None:
    simulated = ladder.reference.simulated
    assert len(simulated["int8-u8"].logits) == len(simulated["int8-s8"].logits) == ladder.probes.real
    assert len(simulated["bf16"].logits) == len(ladder.probes.images)
    errors = {
        form: np.sqrt(np.mean((found.logits - ladder.reference.exact[: len(found.logits)]) ** 2))
        for form, found in simulated.items()
    }
    assert errors["fp16"] < errors["bf16"] < 16 * errors["fp16"]
    assert errors["bf16"] < errors["int8-s8"]


def test_the_bf16_simulation_is_the_one_in_real_bfloat16(ladder: Ladder) -> None:
    module = Simulation(ladder.fused, "bf16")
    x = torch.from_numpy(ladder.probes.images)
    with torch.no_grad():
        real = copy.deepcopy(ladder.fused).bfloat16()(x.bfloat16()).double().numpy()
        got = module(x).double().numpy()
    exact = ladder.reference.exact
    assert np.sqrt(np.mean((got - exact) ** 2)) < 1.7 * np.sqrt(np.mean((real - exact) ** 2))
    assert np.sqrt(np.mean((real - exact) ** 2)) < 1.7 * np.sqrt(np.mean((got - exact) ** 2))
    assert np.array_equal(got, got.astype(ml_dtypes.bfloat16).astype(np.float64))


def test_weights_rounded_to_other_channels_scales_fail_in_int8(ladder: Ladder) -> None:
    found = ladder.reference.simulated["int8-u8"].logits
    everywhere: Any = np.concatenate([found, ladder.reference.unfused[len(found) :]])
    assert all(
        c.holds for c in rung_c("f", everywhere, ladder.reference, ladder.probes, form="int8-u8", policy=LowPolicy())
    )
    exact = ladder.reference.exact
    for factor, holds in ((2.9, True), (3.1, False)):
        candidate = everywhere.astype(np.float64)
        candidate[: len(found)] = exact[: len(found)] + factor * (found - exact[: len(found)])
        assert (
            rung_c("f", candidate, ladder.reference, ladder.probes, form="int8-u8", policy=LowPolicy())[0].holds
            is holds
        )
    everywhere[-1, 0] = np.nan
    checks = rung_c("f", everywhere, ladder.reference, ladder.probes, form="int8-u8", policy=LowPolicy())
    assert [check.name for check in checks if not check.holds] == ["edge inputs not finite"]


def test_a_bfloat16_file_is_emulated_with_its_own_weights_and_every_result_rounded(tmp_path: Path) -> None:
    weights = small_weights()
    cast_to_bf16(small_graph(tmp_path / "a.onnx", weights), tmp_path / "b.onnx")
    x = images(6, size=16)
    got = load_model(tmp_path / "b.onnx", content=emulate_bf16(tmp_path / "b.onnx"), optimise=False).logits(x)

    def half(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values.astype(ml_dtypes.bfloat16).astype(np.float32))

    w = {name: half(values) for name, values in weights.items()}
    y = functional.conv2d(half(x), w["conv.weight"], w["conv.bias"], padding=1).bfloat16().float()
    y = y.relu().mean((2, 3)).bfloat16().float()
    expected = functional.linear(y, w["linear.weight"], w["linear.bias"]).bfloat16().float().numpy()
    # A sum in another order may fall to the other side of a rounding boundary, once in a while.
    assert np.mean(got == expected) > 0.9
    np.testing.assert_allclose(got, expected, rtol=2**-7)
    assert not [
        i for i in onnx.load_from_string(emulate_bf16(tmp_path / "b.onnx")).graph.initializer if i.data_type == 16
    ]
