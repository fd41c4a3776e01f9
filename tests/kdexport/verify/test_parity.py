import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from kdexport.backends.base import IN_ORDER, run_in_batches
from kdexport.reparam.certificate import BlockCertificate
from kdexport.verify.check import Check, check_at_most
from kdexport.verify.parity import check_repeatable, rung_a, rung_b, rung_c, unit_error
from kdexport.verify.policy import Policy
from kdexport.verify.reference import FloatError, Probes, Reference, Simulated, run_torch
from kdexport.verify.simulation import Simulation
from tests.kdexport.verify.small_ladder import Ladder

POLICY = Policy()

# Infinities are subtracted from each other on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def logits32(module: nn.Module, probes: Probes) -> NDArray[np.float32]:
    with torch.no_grad():
        values: NDArray[np.float32] = module(torch.from_numpy(probes.images)).numpy()
    return values


def exact_fused(ladder: Ladder) -> NDArray[np.float64]:
    """The student in float64 by another order of sums: one image at a time."""
    module = copy.deepcopy(ladder.unfused).double()
    return np.concatenate([run_torch(module, image[None].astype(np.float64)) for image in ladder.probes.images])


def half_logits(ladder: Ladder) -> NDArray[np.float32]:
    """The folded student in real float16 arithmetic."""
    module = copy.deepcopy(ladder.fused).half()
    with torch.no_grad():
        values: NDArray[np.float32] = module(torch.from_numpy(ladder.probes.images).half()).float().numpy()
    return values


def failed(checks: Sequence[Check]) -> set[str]:
    return {check.name for check in checks if not check.holds}


def a(ladder: Ladder, fused: NDArray[np.float64]) -> list[Check]:
    return rung_a(ladder.certificate, fused, ladder.reference, ladder.probes, POLICY.A)


def b(ladder: Ladder, candidate: NDArray[np.float32]) -> list[Check]:
    return rung_b("file", candidate, ladder.reference, ladder.probes, POLICY.B)


def c(ladder: Ladder, candidate: NDArray[np.float32]) -> list[Check]:
    return rung_c("file", candidate, ladder.reference, ladder.probes, policy=POLICY.C)


def test_every_rung_holds_for_a_correct_student(ladder: Ladder) -> None:
    checks = [
        *a(ladder, exact_fused(ladder)),
        *b(ladder, logits32(ladder.fused, ladder.probes)),
        *c(ladder, half_logits(ladder)),
    ]
    assert failed(checks) == set()
    assert [(check.rung, check.name) for check in checks] == [
        ("A", "blocks"),
        ("A", "whole"),
        ("B", "rms error"),
        ("B", "max error"),
        ("C", "rms error"),
        ("C", "max error"),
        ("C", "largest activation"),
    ]
    # The values were measured: none of them is zero.
    assert all(check.measured > 0 for check in checks[2:])


@pytest.mark.parametrize("eps", [1e-3, 1.01e-5, 1e-12])
def test_rung_a_finds_a_fold_with_another_epsilon(ladder: Ladder, eps: float) -> None:
    wrong = copy.deepcopy(ladder.unfused).double()
    for module in wrong.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-5
            module.eps = eps
    checks = a(ladder, run_torch(wrong, ladder.probes.images.astype(np.float64)))
    assert failed(checks) == {"whole"}


def test_rung_a_finds_float32_arithmetic(ladder: Ladder) -> None:
    assert failed(a(ladder, logits32(ladder.unfused, ladder.probes).astype(np.float64))) == {"whole"}


def test_rung_a_finds_a_wrong_block_and_names_it(ladder: Ladder) -> None:
    bad = BlockCertificate(name="inner", kind="conv + batch norm", relative_error=2e-9)
    certificate = replace(ladder.certificate, blocks=(*ladder.certificate.blocks, bad))
    checks = rung_a(certificate, exact_fused(ladder), ladder.reference, ladder.probes, POLICY.A)
    assert failed(checks) == {"blocks"}
    assert checks[0].detail == "worst block inner, conv + batch norm"
    assert checks[0].measured == 2e-9


def test_rung_a_of_a_student_without_blocks_is_the_whole(ladder: Ladder) -> None:
    checks = rung_a(
        replace(ladder.certificate, blocks=()), exact_fused(ladder), ladder.reference, ladder.probes, POLICY.A
    )
    assert [(check.name, check.holds) for check in checks] == [("whole", True)]


def rms(values: NDArray[Any]) -> float:
    return math.sqrt(sum(float(value) ** 2 for value in values.ravel()) / values.size)


@pytest.mark.parametrize("luck", [0.0, 0.01, 30.0])
def test_rung_b_measures_multiples_of_the_error_of_the_unfused_model(ladder: Ladder, luck: float) -> None:
    exact = ladder.reference.exact
    own = luck * (ladder.reference.unfused - exact)
    # float64 logits carry the noise exactly; only its size is at issue.
    noisy: Any = exact + own
    reference = replace(ladder.reference, unfused=noisy)
    own = noisy.astype(np.float64) - exact
    # One rounding of what is added up to a logit is the least that the unfused model is taken to be off by.
    unit_rms = max(rms(own), 2**-23 * rms(reference.added))
    unit_max = max(float(np.abs(own).max()), 2**-23 * float(reference.added.max()))
    assert (unit_rms > rms(own)) is (luck < 1)
    noise = np.random.default_rng(1).choice([-1.0, 1.0], exact.shape)
    factors: list[tuple[float, set[str]]] = [(0.0, set()), (1.95, set()), (2.05, {"rms error"}), (10.0, {"rms error"})]
    for factor, expected in factors:
        candidate: Any = exact + factor * unit_rms * noise
        checks = rung_b("file", candidate, reference, ladder.probes, POLICY.B)
        assert checks[0].measured == pytest.approx(factor, abs=1e-3)
        assert checks[1].measured == pytest.approx(factor * unit_rms / unit_max, abs=1e-3)
        assert failed(checks) >= expected
        assert checks[0].holds is not bool(expected)
    for factor, holds in ((3.9, True), (4.1, False)):
        candidate = exact.copy()
        candidate[3, 2] += factor * unit_max
        assert rung_b("file", candidate, reference, ladder.probes, POLICY.B)[1].holds is holds


def test_rung_b_of_sums_in_order_measures_multiples_of_their_error(ladder: Ladder) -> None:
    exact = ladder.reference.exact
    unit_rms = 7 * max(rms(ladder.reference.unfused - exact), 2**-23 * rms(ladder.reference.added))
    unit_max = 5 * unit_error("fp32", ladder.reference)
    reference = replace(ladder.reference, in_order=FloatError(unit_rms, unit_max))
    noise = np.random.default_rng(1).choice([-1.0, 1.0], exact.shape)
    candidate: Any = exact + 1.5 * unit_rms * noise
    checks = rung_b("file", candidate, reference, ladder.probes, POLICY.B, form=IN_ORDER)
    assert [check.unit for check in checks] == ["x sums in order"] * 2
    assert checks[0].measured == pytest.approx(1.5, abs=1e-3)
    assert checks[1].measured == pytest.approx(1.5 * unit_rms / unit_max, abs=1e-3)
    # Another engine is not allowed that much.
    assert not rung_b("file", candidate, reference, ladder.probes, POLICY.B)[0].holds
    # An error that is smaller than the least one is not the unit.
    small = replace(reference, in_order=FloatError(1e-30, 1e-30))
    plain = rung_b("file", candidate, reference, ladder.probes, POLICY.B)
    found = rung_b("file", candidate, small, ladder.probes, POLICY.B, form=IN_ORDER)
    assert [check.measured for check in found] == [check.measured for check in plain]
    assert unit_error(IN_ORDER, reference) == unit_max


def test_float32_noise_of_ten_times_the_usual_fails_in_every_measure(ladder: Ladder) -> None:
    exact = ladder.reference.exact
    candidate: Any = exact + 10 * (ladder.reference.unfused - exact)
    assert failed(b(ladder, candidate)) == {"rms error", "max error"}


def test_rung_b_finds_one_wrong_logit_of_one_image_and_names_it(ladder: Ladder) -> None:
    reference = ladder.reference
    candidate = reference.unfused.copy()
    # Of a processor whose sums are luckily exact, the unit is one rounding of the terms.
    unit = max(np.abs(candidate - reference.exact).max(), 2**-23 * reference.added.max())
    candidate[17, 3] += 6 * unit
    checks = b(ladder, candidate)
    assert "max error" in failed(checks)
    assert 5 <= checks[1].measured <= 7.1
    # The mean over many inputs alone would pass.
    assert checks[0].measured < checks[1].measured
    assert checks[1].detail.startswith("worst input image 17; largest error of the unfused fp32 model ")


def test_a_wrong_edge_input_is_named(ladder: Ladder) -> None:
    candidate = ladder.reference.unfused.copy()
    candidate[ladder.probes.edges.index("solid green") + ladder.probes.real, 0] += 1
    fused = ladder.reference.exact.copy()
    fused[-1, 2] += 1
    assert b(ladder, candidate)[1].detail.startswith("worst input solid green;")
    assert c(ladder, candidate)[0].detail.startswith("worst input solid green;")
    assert a(ladder, fused)[1].detail == "worst input uniform noise"


def test_weights_scaled_by_a_hundredth_fail_in_float32_and_in_float16(ladder: Ladder) -> None:
    wrong = copy.deepcopy(ladder.fused)
    with torch.no_grad():
        for parameter in wrong.parameters():
            parameter.mul_(1.01)
    candidate = logits32(wrong, ladder.probes)
    assert failed(b(ladder, candidate)) == {"rms error", "max error"}
    assert "rms error" in failed(c(ladder, candidate))


@pytest.mark.parametrize(
    ("factor", "expected"), [(0.0, set()), (2.9, set()), (3.1, {"rms error"}), (4.1, {"rms error", "max error"})]
)
def test_rung_c_measures_multiples_of_the_simulated_error(ladder: Ladder, factor: float, expected: set[str]) -> None:
    predicted = ladder.reference.simulated["fp16"].logits - ladder.reference.exact
    candidate: Any = ladder.reference.exact + factor * predicted
    checks = c(ladder, candidate)
    assert failed(checks) == expected
    assert checks[0].measured == pytest.approx(factor)
    assert checks[1].measured == pytest.approx(factor)


def test_one_wrong_logit_that_the_mean_hides_fails_in_float16(ladder: Ladder) -> None:
    candidate: Any = ladder.reference.exact.copy()
    largest = np.abs(ladder.reference.simulated["fp16"].logits - candidate).max()
    candidate[4, 2] += 4.2 * largest
    assert failed(c(ladder, candidate)) == {"max error"}


def test_one_image_that_is_shifted_fails_in_float16(ladder: Ladder) -> None:
    candidate = half_logits(ladder)
    candidate[5] = candidate[6]
    checks = c(ladder, candidate)
    assert failed(checks) == {"rms error", "max error"}
    assert checks[0].detail.startswith("worst input image 5;")


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (1.0, set()),
        (9e3, {"largest activation"}),
        (1e6, {"largest activation", "rms error", "max error"}),
    ],
)
def test_rung_c_requires_headroom_and_finds_an_overflow(ladder: Ladder, gain: float, expected: set[str]) -> None:
    # The next layer divides by the gain: exact in float32, but float16 overflows above 65504.
    conv, linear = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4 * 14 * 14, 5)
    net = nn.Sequential(conv, nn.Flatten(), linear).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        conv.weight.clamp_(-0.3, 0.3).mul_(gain)
        linear.weight.div_(gain)
    simulation = Simulation(net, "fp16")
    exact = run_torch(copy.deepcopy(net).double(), ladder.probes.images.astype(np.float64))
    reference = Reference(
        exact=exact,
        added=np.abs(exact),
        unfused=logits32(net, ladder.probes),
        simulated={"fp16": Simulated(run_torch(simulation, ladder.probes.images).astype(np.float32), simulation.peak)},
    )
    assert np.isfinite(reference.unfused).all()
    candidate: Any = reference.simulated["fp16"].logits
    checks = rung_c("file", candidate, reference, ladder.probes, policy=POLICY.C)
    assert failed(checks) == expected
    # A simulation that overflowed gives no looser limits to a file that did not overflow.
    assert failed(rung_c("file", reference.unfused, reference, ladder.probes, policy=POLICY.C)) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rung", ["A", "B", "C"])
@pytest.mark.parametrize("place", ["candidate", "exact", "base"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_value_that_is_not_finite_never_passes(
    ladder: Ladder, rung: str, place: str, bad: float, everywhere: bool
) -> None:
    arrays: dict[str, Any] = {
        "exact": ladder.reference.exact.copy(),
        "unfused": ladder.reference.unfused.copy(),
        "simulated": ladder.reference.simulated["fp16"].logits.copy(),
    }
    # The candidate has no error, so that only the bad value can fail the check.
    candidate: Any = ladder.reference.exact.copy()
    base = {"A": "exact", "B": "unfused", "C": "simulated"}[rung]
    spoiled = candidate if place == "candidate" else arrays["exact" if place == "exact" else base]
    spoiled[slice(None) if everywhere else (4, 1)] = bad
    arrays["simulated"] = {"fp16": Simulated(arrays["simulated"], 1.0)}
    reference = replace(ladder.reference, **arrays)
    run = {
        "A": lambda: rung_a(ladder.certificate, candidate, reference, ladder.probes, POLICY.A),
        "B": lambda: rung_b("file", candidate, reference, ladder.probes, POLICY.B),
        "C": lambda: rung_c("file", candidate, reference, ladder.probes, policy=POLICY.C),
    }
    names = failed(run[rung]())
    assert {"A": {"whole"}, "B": {"rms error", "max error"}, "C": {"rms error", "max error"}}[rung] == names


def test_the_input_that_is_not_a_number_is_the_worst_one(ladder: Ladder) -> None:
    candidate = ladder.reference.unfused.copy()
    candidate[2] += 1e30
    candidate[9, 4] = np.nan
    assert b(ladder, candidate)[1].detail.startswith("worst input image 9;")


@pytest.mark.parametrize("peak", [math.nan, math.inf, 8188.5])
def test_a_peak_without_headroom_fails(ladder: Ladder, peak: float) -> None:
    reference = with_peak(ladder, peak)
    assert failed(rung_c("file", half_logits(ladder), reference, ladder.probes, policy=POLICY.C)) == {
        "largest activation"
    }
    reference = with_peak(ladder, 8188.0)
    assert failed(rung_c("file", half_logits(ladder), reference, ladder.probes, policy=POLICY.C)) == set()


def with_peak(ladder: Ladder, peak: float) -> Reference:
    return replace(ladder.reference, simulated={"fp16": replace(ladder.reference.simulated["fp16"], peak=peak)})


def test_a_baseline_of_zero_error_allows_zero_error_and_nothing_more(ladder: Ladder) -> None:
    zero = np.zeros_like(ladder.reference.exact)
    same = zero.astype(np.float32)
    reference = replace(
        ladder.reference,
        exact=zero,
        added=zero,
        unfused=same.copy(),
        simulated={"fp16": Simulated(same.copy(), 1.0)},
    )
    assert failed(rung_b("file", same, reference, ladder.probes, POLICY.B)) == set()
    assert failed(rung_c("file", same, reference, ladder.probes, policy=POLICY.C)) == set()
    same[8, 1] = 1e-30
    assert failed(rung_b("file", same, reference, ladder.probes, POLICY.B)) == {"rms error", "max error"}
    assert failed(rung_c("file", same, reference, ladder.probes, policy=POLICY.C)) == {"rms error", "max error"}


def test_logits_of_zero_are_compared_like_any_other(ladder: Ladder) -> None:
    zero = np.zeros_like(ladder.reference.exact)
    reference = replace(ladder.reference, exact=zero)
    assert failed(rung_a(ladder.certificate, zero, reference, ladder.probes, POLICY.A)) == set()
    other = zero.copy()
    other[0, 0] = 1e-300
    assert failed(rung_a(ladder.certificate, other, reference, ladder.probes, POLICY.A)) == {"whole"}


def test_a_steady_candidate_is_repeatable_in_any_layout(ladder: Ladder) -> None:
    seen: list[bool] = []

    def steady(images: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(images.flags.c_contiguous)
        values: NDArray[np.float32] = np.ascontiguousarray(images).sum(axis=(2, 3))
        return values

    checks = check_repeatable("file", steady, ladder.probes, 5)
    assert failed(checks) == set()
    assert seen == [True, True, False]


def test_a_candidate_with_different_answers_for_one_input_is_found(ladder: Ladder) -> None:
    rng = np.random.default_rng(0)

    def unstable(images: NDArray[np.float32]) -> NDArray[np.float32]:
        values: NDArray[np.float32] = images.mean(axis=(2, 3))
        return values + rng.normal(0, 1e-6, (len(images), 3)).astype(np.float32)

    assert "same input twice" in failed(check_repeatable("file", unstable, ladder.probes, 5))


def test_a_candidate_that_ignores_the_memory_layout_is_found(ladder: Ladder) -> None:
    def ignores_layout(images: NDArray[np.float32]) -> NDArray[np.float32]:
        memory = images.ravel(order="K").reshape(images.shape)
        values: NDArray[np.float32] = memory.mean(axis=(2, 3))
        return values

    assert failed(check_repeatable("file", ignores_layout, ladder.probes, 5)) == {"channels-last input"}


def test_a_candidate_that_returns_no_number_is_not_repeatable(ladder: Ladder) -> None:
    def not_a_number(images: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.full((len(images), 3), np.nan, np.float32)

    assert failed(check_repeatable("file", not_a_number, ladder.probes, 5)) == {
        "same input twice",
        "channels-last input",
    }


@pytest.mark.parametrize("count", [1, 3, 22, 34])
def test_batches_take_all_sizes_in_turn_and_keep_the_order(count: int) -> None:
    images = np.random.default_rng(count).normal(size=(count, 3, 2, 2)).astype(np.float32)
    sizes: list[int] = []

    def first(chunk: NDArray[np.float32]) -> NDArray[np.float32]:
        sizes.append(len(chunk))
        return chunk[:, :, 0, 0]

    np.testing.assert_array_equal(run_in_batches(first, images, (1, 8, 7, 16)), images[:, :, 0, 0])
    assert sizes == {1: [1], 3: [1, 2], 22: [1, 8, 7, 6], 34: [1, 8, 7, 16, 1, 1]}[count]


def test_a_check_holds_up_to_its_limit_and_not_above() -> None:
    def holds(measured: float) -> bool:
        return check_at_most("B", "s", "n", measured, 2.0, unit="x").holds

    assert holds(2.0)
    assert holds(-5.0)
    assert not holds(math.nextafter(2.0, 3))
    assert not holds(math.nan)
    assert not holds(math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_json_holds_no_nan_and_no_infinity(bad: float) -> None:
    check = Check(rung="C", subject="s", name="n", holds=False, measured=bad, allowed=3.0, unit="x", detail="d")
    data = json.loads(json.dumps(check.to_json(), allow_nan=False))
    assert data == {
        "rung": "C",
        "subject": "s",
        "name": "n",
        "holds": False,
        "measured": None,
        "allowed": 3.0,
        "unit": "x",
        "detail": "d",
        "undecided": False,
        "beyond": False,
        "ran": True,
    }
