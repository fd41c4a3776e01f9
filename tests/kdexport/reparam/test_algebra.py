import copy
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from kdexport.errors import ReparamError
from kdexport.reparam.algebra import AnyBatchNorm, fold_batch_norm, merge_branches
from tests.kdexport.hostile_values import noise, randomize, relative_difference

LIMIT = 1e-12
BATCH_NORMS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}


def with_weights(layer: nn.Module, weights: tuple[Tensor, Tensor]) -> nn.Module:
    """A copy of ``layer`` with other weights and, whether or not it had one, a bias."""
    twin = copy.deepcopy(layer)
    twin.weight, twin.bias = nn.Parameter(weights[0]), nn.Parameter(weights[1])
    return twin


def fold(layer: nn.Module, batch_norm: nn.Module) -> tuple[Tensor, Tensor]:
    return fold_batch_norm(
        cast(Tensor, layer.weight), cast("Tensor | None", layer.bias), cast(AnyBatchNorm, batch_norm)
    )


def assert_fold_is_exact(layer: nn.Module, batch_norm: nn.Module, x: Tensor) -> None:
    pair = randomize(nn.Sequential(layer, batch_norm).double().eval(), seed=11)
    with torch.no_grad():
        reference = pair(x)
        folded = with_weights(layer, fold(layer, batch_norm))(x)
        # The unfolded layer alone must be far away, or the comparison proves nothing.
        assert relative_difference(layer(x), reference) > 1e-2
        assert relative_difference(folded, reference) <= LIMIT


@pytest.mark.parametrize("conv_type", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_fold_is_exact_in_every_dimension_padding_mode_and_grouping(
    conv_type: Any, bias: bool, padding_mode: str, groups: int
) -> None:
    # With 6 groups over 6 channels and 12 outputs it is depthwise with a multiplier of 2.
    conv = conv_type(6, 12, 3, stride=2, padding=2, dilation=1, groups=groups, bias=bias, padding_mode=padding_mode)
    dimensions = int(conv_type.__name__[4])
    assert_fold_is_exact(conv, BATCH_NORMS[conv_type](12, eps=3e-4), noise(3, 6, *(7, 9, 5)[:dimensions]))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    groups=st.integers(1, 4),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.floats(1e-7, 0.3),
)
def test_fold_is_exact_for_any_geometry_and_eps(
    groups: int,
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    bias: bool,
    affine: bool,
    eps: float,
) -> None:
    conv = nn.Conv2d(inputs * groups, outputs * groups, kernel, stride, padding, dilation, groups, bias)
    batch_norm = nn.BatchNorm2d(outputs * groups, eps=eps, affine=affine)
    pair = randomize(nn.Sequential(conv, batch_norm).double().eval(), seed=3)
    x = noise(2, inputs * groups, 9, 11)
    with torch.no_grad():
        assert relative_difference(with_weights(conv, fold(conv, batch_norm))(x), pair(x)) <= LIMIT


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_fold_keeps_named_paddings_exact(padding: str) -> None:
    assert_fold_is_exact(nn.Conv2d(5, 7, (3, 5), padding=padding), nn.BatchNorm2d(7), noise(2, 5, 11, 9))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_fold_is_exact_for_a_linear_layer(bias: bool, affine: bool) -> None:
    assert_fold_is_exact(nn.Linear(13, 7, bias=bias), nn.BatchNorm1d(7, affine=affine, eps=2e-2), noise(5, 13))


def test_fold_is_exact_for_a_synchronised_batch_norm() -> None:
    assert_fold_is_exact(nn.Conv2d(3, 5, 3, bias=False), nn.SyncBatchNorm(5, eps=1e-2), noise(2, 3, 7, 9))


def test_fold_reads_the_eps_of_the_batch_norm_it_is_given() -> None:
    conv, batch_norm = nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3, eps=1e-3)
    randomize(nn.Sequential(conv, batch_norm).eval())
    batch_norm.running_var = torch.full((3,), 1e-4)
    coarse = fold(conv, batch_norm)[0]
    batch_norm.eps = 1e-5
    fine = fold(conv, batch_norm)[0]
    # sqrt((1e-4 + 1e-3) / (1e-4 + 1e-5)) = sqrt(10)
    np.testing.assert_allclose((fine / coarse).detach().numpy(), np.sqrt(10.0), rtol=1e-5)


def test_fold_without_affine_parameters_takes_gain_one_and_shift_zero() -> None:
    batch_norm = nn.BatchNorm1d(2, eps=0.25, affine=False).double()
    batch_norm.running_mean = torch.tensor([3.0, -8.0], dtype=torch.float64)
    batch_norm.running_var = torch.tensor([2.0, 15.75], dtype=torch.float64)
    weight, bias = fold_batch_norm(
        torch.tensor([[3.0, 6.0], [8.0, -4.0]], dtype=torch.float64),
        torch.tensor([6.0, 0.0], dtype=torch.float64),
        batch_norm,
    )
    np.testing.assert_allclose(weight.numpy(), [[2.0, 4.0], [2.0, -1.0]], rtol=1e-15)
    np.testing.assert_allclose(bias.numpy(), [2.0, 2.0], rtol=1e-15)


def test_a_batch_norm_without_running_statistics_is_refused() -> None:
    with pytest.raises(ReparamError, match="keeps no running statistics"):
        fold(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5, track_running_stats=False))


def test_a_batch_norm_of_another_channel_count_is_refused_with_both_counts() -> None:
    with pytest.raises(ReparamError, match="over 6 channels follows a layer with 5 output channels"):
        fold(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(6))
    # One channel would broadcast over five without a word.
    with pytest.raises(ReparamError, match="over 1 channels"):
        fold(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(1))


def float64_fold(conv: nn.Conv2d, batch_norm: nn.BatchNorm2d) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The inference transform in numpy float64, unrounded."""

    def array(tensor: Tensor | None) -> np.ndarray[Any, Any]:
        assert tensor is not None
        return tensor.detach().numpy().astype(np.float64)

    gain = array(batch_norm.weight) / np.sqrt(array(batch_norm.running_var) + batch_norm.eps)
    bias = (array(conv.bias) - array(batch_norm.running_mean)) * gain + array(batch_norm.bias)
    return array(conv.weight) * gain[:, None, None, None], bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fold_of_a_narrow_type_is_computed_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    conv, batch_norm = nn.Conv2d(17, 31, 3), nn.BatchNorm2d(31, eps=1e-3)
    randomize(nn.Sequential(conv, batch_norm).eval())
    # Weights that the narrow type represents, so that widening them loses nothing.
    conv.weight.data, conv.bias.data = conv.weight.data.to(dtype).float(), conv.bias.data.to(dtype).float()  # type: ignore[union-attr]
    expected = [torch.from_numpy(array).to(dtype) for array in float64_fold(conv, batch_norm)]
    assert conv.bias is not None
    weight, bias = fold_batch_norm(conv.weight.to(dtype), conv.bias.to(dtype), batch_norm)
    assert weight.dtype == bias.dtype == dtype
    assert torch.equal(weight, expected[0])
    assert torch.equal(bias, expected[1])


def test_fold_leaves_its_inputs_untouched_and_hands_out_no_alias() -> None:
    conv, batch_norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
    pair = randomize(nn.Sequential(conv, batch_norm).double().eval())
    before = copy.deepcopy(pair.state_dict())
    weight, bias = fold(conv, batch_norm)
    weight.mul_(0)
    bias.mul_(0)
    assert not weight.requires_grad
    assert not bias.requires_grad
    after = pair.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


Branches = list[tuple[Tensor, Tensor | None]]


def random_branches(count: int, biases: list[bool], dtype: torch.dtype = torch.float64) -> Branches:
    return [
        (
            noise(6, 2, 3, 3, seed=i).to(dtype),
            noise(6, seed=50 + i).to(dtype) if biases[i % len(biases)] else None,
        )
        for i in range(count)
    ]


def run_branch(branch: tuple[Tensor, Tensor | None], x: Tensor) -> Tensor:
    return functional.conv2d(x, branch[0], branch[1], stride=2, padding=1, groups=3)


@pytest.mark.parametrize("count", [1, 2, 3, 16])
@pytest.mark.parametrize("biases", [[True], [False], [True, False]], ids=["biased", "bare", "mixed"])
def test_merge_is_the_uniform_mean_by_default(count: int, biases: list[bool]) -> None:
    branches, x = random_branches(count, biases), noise(2, 6, 7, 9)
    reference = torch.stack([run_branch(branch, x) for branch in branches]).mean(0)
    assert relative_difference(run_branch(merge_branches(branches), x), reference) <= LIMIT


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.floats(-8, 8, allow_nan=False).filter(lambda c: abs(c) > 1e-3), min_size=1, max_size=6).filter(
        lambda cs: len(set(cs)) == len(cs)
    )
)
def test_merge_weighs_each_branch_by_its_own_coefficient(coefficients: list[float]) -> None:
    branches, x = random_branches(len(coefficients), [True, False]), noise(2, 6, 7, 9)
    outputs = [coefficient * run_branch(branch, x) for coefficient, branch in zip(coefficients, branches, strict=True)]
    merged = run_branch(merge_branches(branches, coefficients), x)
    # Relative to the largest summand: coefficients of both signs may cancel.
    largest = max(output.abs().max() for output in outputs)
    assert ((merged - sum(outputs)).abs().max() / largest).item() <= LIMIT


def test_merge_of_bare_branches_has_a_zero_bias() -> None:
    weight, bias = merge_branches(random_branches(3, [False], torch.float32))
    assert torch.equal(bias, torch.zeros(6))
    assert weight.dtype == bias.dtype == torch.float32


def test_merge_of_float32_is_summed_in_float64_and_rounded_once() -> None:
    # In float32, 1e8 + 1 - 1e8 is 0.
    branches: Branches = [(torch.full((1, 1), value), torch.full((1,), value)) for value in (1e8, 1.0, -1e8)]
    weight, bias = merge_branches(branches, [1.0, 1.0, 1.0])
    assert weight.item() == 1.0
    assert bias.item() == 1.0
    many = random_branches(7, [True], torch.float32)
    expected = np.mean([weight.numpy().astype(np.float64) for weight, _ in many], axis=0).astype(np.float32)
    assert np.array_equal(merge_branches(many)[0].numpy(), expected)


def test_merge_leaves_its_inputs_untouched_and_hands_out_no_alias() -> None:
    branches = random_branches(1, [True])
    before = copy.deepcopy(branches)
    weight, bias = merge_branches(branches)
    weight.mul_(0)
    bias.mul_(0)
    assert torch.equal(branches[0][0], before[0][0])
    assert torch.equal(cast(Tensor, branches[0][1]), cast(Tensor, before[0][1]))


def test_merge_of_nothing_is_refused() -> None:
    with pytest.raises(ReparamError, match="no branch to merge"):
        merge_branches([])


def test_merge_of_different_shapes_is_refused_with_the_shapes() -> None:
    # (6,1,1,1) would broadcast.
    with pytest.raises(ReparamError, match=r"\(6, 1, 1, 1\), \(6, 2, 3, 3\)"):
        merge_branches([(noise(6, 2, 3, 3), None), (noise(6, 1, 1, 1), None)])


@pytest.mark.parametrize("coefficients", [[], [1.0], [0.2, 0.3, 0.5]])
def test_a_wrong_number_of_coefficients_is_refused(coefficients: list[float]) -> None:
    with pytest.raises(ReparamError, match=f"2 branches were given {len(coefficients)} coefficients"):
        merge_branches(random_branches(2, [True]), coefficients)
