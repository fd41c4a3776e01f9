import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kdexport.backends.base import IN_ORDER
from kdexport.data.preprocessing import Preprocessing
from kdexport.verify.reference import Probes, make_probes, make_reference, run_exact, run_torch
from kdexport.verify.simulation import TF32, Simulation, round_tf32
from tests.kdexport.verify.small_ladder import PREPROCESSING, Ladder, SmallNet, pixels

MEAN, STD = np.asarray(PREPROCESSING.mean), np.asarray(PREPROCESSING.std)


def back_to_pixels(image: NDArray[np.float32]) -> NDArray[np.float64]:
    """A normalised (3,S,S) image as (S,S,3) values of 0 to 255."""
    values: NDArray[np.float64] = (image.astype(np.float64).transpose(1, 2, 0) * STD + MEAN) * 255
    return values


def edges(probes: Probes) -> dict[str, NDArray[np.float64]]:
    return {probes.name(i): back_to_pixels(probes.images[i]) for i in range(probes.real, len(probes.images))}


def test_real_images_come_first_and_are_normalised() -> None:
    real = pixels(5)
    probes = make_probes(real, PREPROCESSING)
    assert probes.real == 5
    assert probes.images.dtype == np.float32
    assert probes.images.shape == (5 + len(probes.edges), 3, 16, 16)
    expected = (real.astype(np.float64) / 255 - MEAN) / STD
    np.testing.assert_allclose(probes.images[:5], expected.transpose(0, 3, 1, 2), rtol=0, atol=1e-6)
    assert [probes.name(i) for i in (0, 4, 5, 6)] == ["image 0", "image 4", "all 0", "all 255"]


def test_the_edge_cases_are_what_their_names_say() -> None:
    found = edges(make_probes(pixels(2), PREPROCESSING))
    assert len(found) == 11
    np.testing.assert_allclose(found["all 0"], 0, atol=1e-4)
    np.testing.assert_allclose(found["all 255"], 255, atol=1e-4)
    for channel, name in enumerate(("red", "green", "blue")):
        expected = np.zeros(3)
        expected[channel] = 255
        np.testing.assert_allclose(found[f"solid {name}"], np.broadcast_to(expected, (16, 16, 3)), atol=1e-4)
        np.testing.assert_allclose(found[f"all but {name}"], np.broadcast_to(255 - expected, (16, 16, 3)), atol=1e-4)
    for i, j in ((0, 0), (0, 1), (1, 0), (7, 8), (15, 15)):
        np.testing.assert_allclose(found["checkerboard"][i, j], (i + j) % 2 * 255, atol=1e-4)
    for name, values in (("binary noise", {0, 255}), ("uniform noise", set(range(256)))):
        seen = set(found[name].round().astype(int).ravel().tolist())
        assert seen <= values
        assert len(seen) > min(len(values), 100) - 1
        assert np.abs(found[name] - found[name][::-1]).max() > 100
        assert np.abs(found[name] - found[name].transpose(1, 0, 2)).max() > 100


def test_probes_are_the_same_each_time_and_of_the_size_of_the_student() -> None:
    first, again = make_probes(pixels(3), PREPROCESSING), make_probes(pixels(3), PREPROCESSING)
    assert first.images.tobytes() == again.images.tobytes()
    size = Preprocessing(image_size=9, resize=11, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert make_probes(np.zeros((1, 9, 9, 3), np.uint8), size).images.shape == (12, 3, 9, 9)


def test_the_exact_reference_is_float64_and_an_independent_run_gives_it(ladder: Ladder) -> None:
    module = copy.deepcopy(ladder.unfused).double()
    with torch.no_grad():
        expected = torch.cat([module(torch.from_numpy(image[None]).double()) for image in ladder.probes.images]).numpy()
    exact = ladder.reference.exact
    assert exact.dtype == np.float64
    assert np.abs(exact - expected).max() <= 1e-12 * np.abs(expected).max()
    # Logits that were ever float32 would survive a round trip through it.
    assert np.count_nonzero(exact != exact.astype(np.float32)) > exact.size * 0.9
    difference = np.abs(ladder.reference.unfused - exact).max() / np.abs(exact).max()
    assert 1e-9 < difference < 1e-5


def test_the_float32_reference_is_the_module_as_it_is(ladder: Ladder) -> None:
    with torch.no_grad():
        expected = ladder.unfused(torch.from_numpy(ladder.probes.images)).numpy()
    assert ladder.reference.unfused.dtype == np.float32
    np.testing.assert_allclose(ladder.reference.unfused, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_making_a_reference_leaves_modules_and_probes_as_they_were(ladder: Ladder) -> None:
    unfused, fused = copy.deepcopy(ladder.unfused), copy.deepcopy(ladder.fused)
    before = ladder.probes.images.copy()
    reference = make_reference(ladder.unfused, ladder.fused, ladder.probes)
    assert reference.exact.tobytes() == ladder.reference.exact.tobytes()
    np.testing.assert_array_equal(ladder.probes.images, before)
    for module, copied in ((ladder.unfused, unfused), (ladder.fused, fused)):
        for name, value in module.state_dict().items():
            assert torch.equal(value, copied.state_dict()[name])
            assert value.dtype == copied.state_dict()[name].dtype


@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
def test_images_are_run_in_order_whatever_their_number(count: int) -> None:
    x = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    logits = run_torch(nn.Identity(), x)
    assert logits.dtype == np.float64
    np.testing.assert_array_equal(logits, x)


def rounded(x: Tensor) -> Tensor:
    return x.half().float()


def by_layers(net: nn.Module, images: Tensor) -> tuple[Tensor, float]:
    """The folded SmallNet with each result rounded to float16, written out; and the largest result before rounding."""
    weights = {name: rounded(value) for name, value in net.state_dict().items()}
    seen: list[float] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x.abs().max().item())
        return rounded(x)

    x = keep(images)
    x = keep(functional.conv2d(x, weights["stem.weight"], weights["stem.bias"], stride=2, padding=1))
    x = keep(functional.relu(x))
    y = keep(functional.conv2d(x, weights["inner.weight"], weights["inner.bias"], padding=1, groups=2))
    x = keep(functional.relu(keep(x + y)))
    x = keep(x.mean((2, 3)))
    return keep(functional.linear(x, weights["linear.weight"], weights["linear.bias"])), max(seen)


def test_the_float16_simulation_is_the_one_written_out_by_layers(ladder: Ladder) -> None:
    images = torch.from_numpy(ladder.probes.images)
    with torch.no_grad():
        expected, peak = by_layers(ladder.fused, images)
        simulation = Simulation(ladder.fused, "fp16")
        got = simulation(images)
        exact = ladder.fused(images)
    assert torch.equal(got, rounded(got))
    scale = exact.abs().max().item()
    error = (expected - exact).abs().max().item() / scale
    assert 1e-5 < error < 1e-2
    # One float32 accumulation in another order may move one result across a rounding boundary.
    assert ((got - expected).abs().max().item() / scale) < error / 4
    assert (got == expected).float().mean().item() > 0.9
    assert simulation.peak == pytest.approx(peak, rel=1e-3)


def test_weights_are_rounded_too() -> None:
    linear = nn.Linear(1, 1)
    with torch.no_grad():
        linear.weight.fill_(1 + 2**-12)
        linear.bias.fill_(2**-26)
        assert Simulation(linear, "fp16")(torch.ones(1, 1)).item() == 1.0
        # 1.0006 is no float16; the input is rounded before it is multiplied.
        linear.weight.fill_(1024.0)
        assert Simulation(linear, "fp16")(torch.full((1, 1), 1 + 2**-12)).item() == 1024.0
        assert linear.weight.item() == 1024.0
        assert linear(torch.full((1, 1), 1 + 2**-12)).item() == 1024.25


def test_the_peak_is_the_largest_value_of_any_layer_and_of_any_run() -> None:
    first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        first.weight.fill_(-3000.0)
        second.weight.fill_(0.001)
        simulation = Simulation(nn.Sequential(first, second), "fp16")
        assert simulation.peak == 0
        simulation(torch.full((1, 1), 4.0))
        assert simulation.peak == 12000.0
        simulation(torch.full((1, 1), 0.5))
        assert simulation.peak == 12000.0


def test_an_activation_that_overflows_float16_is_visible() -> None:
    linear = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        linear.weight.fill_(300.0)
        simulation = Simulation(linear, "fp16")
        assert simulation(torch.full((1, 1), 250.0)).item() == np.inf
    assert simulation.peak == 75_000


def test_a_weight_that_overflows_float16_is_visible() -> None:
    linear = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1e5, -1e5]]))
        simulation = Simulation(linear, "fp16")
        assert np.isnan(simulation(torch.ones(1, 2)).item())
    assert simulation.peak == np.inf


def test_a_value_that_is_not_a_number_stays_visible_after_later_layers() -> None:
    with torch.no_grad():
        simulation = Simulation(nn.Sequential(nn.Identity(), nn.ReLU(), nn.Linear(2, 2)), "fp16")
        assert simulation(torch.tensor([[1.0, np.nan]])).isnan().any()
        simulation(torch.ones(1, 2))
    assert simulation.peak == np.inf


def test_the_simulation_leaves_module_and_input_unchanged() -> None:
    net = SmallNet().eval()
    before = copy.deepcopy(net.state_dict())
    images = torch.full((2, 3, 16, 16), 1 / 3)
    with torch.no_grad():
        Simulation(net, "fp16")(images)
    assert torch.equal(images, torch.full((2, 3, 16, 16), 1 / 3))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    # Outside of the simulation nothing is rounded.
    assert (torch.ones(1) / 3).item() != rounded(torch.ones(1) / 3).item()


def bits(values: Tensor, mantissa: int) -> Tensor:
    """float32 values at ``mantissa`` bits by scaling in float64, to nearest, ties to even."""
    exact = values.double()
    step = torch.pow(2.0, torch.floor(torch.log2(exact.abs())) - mantissa)
    return (torch.round(exact / step) * step).float()


def test_tf32_keeps_ten_bits() -> None:
    values = torch.randn(5000) * torch.logspace(-20, 20, 5000)
    assert torch.equal(round_tf32(values), bits(values, 10))
    odd = torch.tensor([np.nan, np.inf, -np.inf, 0.0, -0.0])
    assert torch.equal(round_tf32(odd).nan_to_num(7.0), odd.nan_to_num(7.0))


def test_tf32_rounds_what_products_read_and_nothing_else() -> None:
    linear = nn.Linear(1, 1)
    fine = 1 + 2**-12
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.bias.fill_(fine)
        # The input loses its last bits, the bias and the sum keep theirs.
        assert Simulation(linear, TF32)(torch.full((1, 1), fine)).item() == 1 + fine
        conv = nn.Conv2d(1, 1, 1, bias=False)
        conv.weight.fill_(fine)
        assert Simulation(conv, TF32)(torch.full((1, 1, 1, 1), 3.0)).item() == 3.0
        assert conv.weight.item() == np.float32(fine)


@pytest.mark.parametrize("layer", [nn.Linear(5, 2), nn.Conv2d(5, 2, 1), nn.Conv2d(2, 2, 3, groups=2)])
def test_sums_in_order_start_with_the_bias(layer: nn.Linear | nn.Conv2d) -> None:
    """Each product is half of the last bit of the bias and is lost; added before the bias, all would remain."""
    with torch.no_grad():
        layer.weight.fill_(1.0)
        assert layer.bias is not None
        layer.bias.copy_(torch.tensor([2.0**24, 0.0]))
    shape = (1, 5) if isinstance(layer, nn.Linear) else (1, layer.in_channels, *layer.kernel_size)
    products = layer.weight[0].numel()
    found = Simulation(layer, IN_ORDER)(torch.ones(shape)).flatten().tolist()
    assert found == [2.0**24, products]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(2, 1), groups=2, bias=False),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4), nn.Conv2d(4, 3, (2, 3), stride=(1, 3)),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 9 * 8, 3, bias=False)),
    ],
)  # fmt: skip
def test_sums_in_order_are_those_of_the_layer(layer: nn.Module) -> None:
    images = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(2))
    exact = copy.deepcopy(layer).double()(images.double())
    found = Simulation(layer, IN_ORDER)(images)
    assert found.shape == exact.shape
    error = (found - exact).abs().max()
    assert 0 < error < 1e-5


def test_the_error_of_sums_in_order_is_part_of_the_reference(ladder: Ladder) -> None:
    probes = replace(ladder.probes, real=5)
    reference = make_reference(ladder.unfused, ladder.fused, probes, forms=("fp32", IN_ORDER))
    assert IN_ORDER not in reference.simulated
    error = np.abs(run_torch(Simulation(ladder.fused, IN_ORDER), probes.images) - reference.exact)
    assert reference.in_order is not None
    assert reference.in_order.largest == error.max()
    assert reference.in_order.rms == pytest.approx(np.sqrt(np.mean(error[:5] ** 2)), rel=1e-12)
    assert ladder.reference.in_order is None


def test_the_error_of_a_simulation_follows_the_length_of_its_mantissa(ladder: Ladder) -> None:
    images, errors = ladder.probes.images, {}
    for form in (TF32, "fp16", "bf16"):
        simulated = run_torch(Simulation(ladder.fused, form), images)
        errors[form] = np.sqrt(np.mean((simulated - ladder.reference.exact) ** 2))
    assert 4 < errors["bf16"] / errors["fp16"] < 16
    assert errors[TF32] < errors["fp16"]
    assert errors[TF32] > 100 * np.abs(ladder.reference.unfused - ladder.reference.exact).mean()


def test_the_unit_of_a_logit_is_the_sum_of_its_absolute_products(ladder: Ladder) -> None:
    # More images than one pass takes.
    images = np.random.default_rng(8).normal(0, 2, (70, 3, 16, 16)).astype(np.float32)
    net = copy.deepcopy(ladder.unfused)
    assert isinstance(net, SmallNet)
    exact, added = run_exact(net, images)
    double = copy.deepcopy(net).double()
    weight, bias = double.linear.weight.detach().numpy(), double.linear.bias.detach().numpy()
    features: list[Tensor] = []
    double.linear.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    with torch.no_grad():
        logits = double(torch.from_numpy(images).double()).numpy()
    wanted = np.array(
        [
            [
                sum(abs(w * x) for w, x in zip(row, image, strict=True)) + abs(b)
                for row, b in zip(weight, bias, strict=True)
            ]
            for image in features[0].numpy()
        ]
    )
    np.testing.assert_allclose(added, wanted, rtol=1e-12)
    np.testing.assert_allclose(exact, logits, rtol=1e-12)
    assert (added >= np.abs(exact)).all()
    # The student that was given is as it was.
    assert next(net.parameters()).dtype == torch.float32
    assert not net.linear._forward_hooks


def test_without_a_last_linear_layer_the_logits_themselves_are_the_unit() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 16), nn.Flatten()).eval()
    exact, added = run_exact(net, make_probes(pixels(2), PREPROCESSING).images)
    assert np.array_equal(added, np.abs(exact))
