import math

import pytest
import torch

from kdexport.errors import CertificateError
from kdexport.reparam.certificate import BlockCertificate, Certificate, hostile_input, relative_error


def certificate(whole: float, *blocks: float) -> Certificate:
    return Certificate(
        blocks=tuple(
            BlockCertificate(name=f"block{i}", kind="conv + batch norm", relative_error=error)
            for i, error in enumerate(blocks)
        ),
        whole_relative_error=whole,
        input_shape=(2, 3, 5, 7),
        unfused_parameters=11,
        fused_parameters=7,
    )


def test_a_certificate_holds_up_to_its_limit_and_not_above() -> None:
    assert certificate(1e-9, 0.0, 1e-9).holds
    assert not certificate(math.nextafter(1e-9, 1), 0.0).holds
    assert not certificate(0.0, 0.0, math.nextafter(1e-9, 1)).holds


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_never_passes(bad: float, place: int) -> None:
    errors = [1e-16, 1e-12, 2e-16]
    errors[place] = bad
    found = certificate(*errors)
    assert not found.holds
    with pytest.raises(CertificateError):
        found.require()


def test_the_worst_block_is_the_largest_error_and_nan_is_larger_still() -> None:
    worst = certificate(0.0, 1e-3, 7.0, 1e-5).worst
    assert worst is not None
    assert worst.name == "block1"
    worst = certificate(0.0, 1e-3, 7.0, math.nan, 1e30).worst
    assert worst is not None
    assert worst.name == "block2"
    assert certificate(0.0).worst is None


def test_a_failed_certificate_says_the_numbers_the_limit_and_the_block() -> None:
    with pytest.raises(CertificateError) as caught:
        certificate(3.25e-4, 1e-16, 0.125).require()
    assert str(caught.value) == (
        "The folded module differs from the original by 3.25e-04 of its largest output in float64 (up to 1e-09 allowed)"
        "; worst block block1 (conv + batch norm) at 1.25e-01.\n"
        "This is an algebra error, not rounding: report the module that shows it."
    )


def test_relative_error_is_the_largest_difference_over_the_largest_reference() -> None:
    reference = torch.tensor([[-8.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    candidate = torch.tensor([[-8.0, 3.0], [1.0, 0.5]], dtype=torch.float64)
    assert relative_error(candidate, reference) == 0.25


def test_relative_error_to_zero_is_absolute() -> None:
    assert relative_error(torch.tensor([0.0, -3.0]), torch.zeros(2)) == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_relative_error_of_what_is_not_finite_is_nan_on_either_side_or_both(bad: float) -> None:
    good, broken = torch.tensor([1.0, 2.0]), torch.tensor([1.0, bad])
    assert math.isnan(relative_error(broken, good))
    assert math.isnan(relative_error(good, broken))
    assert math.isnan(relative_error(broken, broken))


def test_relative_error_of_different_shapes_is_nan_where_they_would_broadcast() -> None:
    assert math.isnan(relative_error(torch.ones(3, 1), torch.ones(3, 4)))


def test_the_hostile_input_is_fixed_off_centre_and_not_of_unit_variance() -> None:
    x = hostile_input((4, 3, 32, 32))
    assert x.dtype == torch.float64
    assert torch.equal(x, hostile_input((4, 3, 32, 32)))
    assert x.mean().item() == pytest.approx(0.3, abs=0.1)
    assert x.std().item() == pytest.approx(1.7, abs=0.1)
