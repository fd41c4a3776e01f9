"""A pointwise convolution folds through global average pooling into the linear layer behind it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kdexport.errors import ReparamError
from kdexport.reparam.compose import pool_to_linear
from kdexport.reparam.convolution import from_layer
from tests.kdexport.hostile_values import noise, randomize, relative_difference

LIMIT = 1e-12


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("conv_bias", [True, False])
@pytest.mark.parametrize("linear_bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
def test_a_pointwise_convolution_folds_through_pooling_into_the_classifier(
    groups: int, conv_bias: bool, linear_bias: bool, size: tuple[int, int]
) -> None:
    conv, linear = nn.Conv2d(9, 21, 1, bias=conv_bias, groups=groups), nn.Linear(21, 4, bias=linear_bias)
    net = randomize(nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear).double())
    x = noise(3, 9, *size)
    with torch.no_grad():
        folded = pool_to_linear(from_layer(conv), from_layer(linear))
        assert folded.weight.shape == (4, 9)
        pooled = functional.avg_pool2d(x, size).flatten(1)
        assert relative_difference(functional.linear(pooled, folded.weight, folded.bias), net(x)) <= LIMIT


def test_weights_of_float32_are_composed_in_float64() -> None:
    conv, linear = nn.Conv2d(33, 65, 1), nn.Linear(65, 5)
    randomize(nn.Sequential(conv, linear))
    outer = linear.weight.detach().numpy().astype(np.float64)
    inner = conv.weight.detach().numpy().astype(np.float64)[:, :, 0, 0]
    folded = pool_to_linear(from_layer(conv), from_layer(linear))
    assert folded.weight.dtype == folded.bias.dtype == torch.float64
    wanted = np.einsum("ka,ac->kc", outer, inner)
    assert np.array_equal(folded.weight.float().numpy(), wanted.astype(np.float32))
    assert np.abs(folded.weight.numpy() - wanted).max() < 1e-14


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(9, 21, 3), nn.Conv2d(9, 21, (1, 3), padding=(0, 1)), nn.Conv2d(9, 21, 1, stride=2),
        nn.Conv2d(9, 21, 1, padding=1),
    ],
    ids=["spatial", "row", "strided", "padded"],
)  # fmt: skip
def test_a_convolution_that_does_not_commute_with_pooling_is_refused(conv: nn.Module) -> None:
    with pytest.raises(ReparamError, match="does not commute with the mean over positions"):
        pool_to_linear(from_layer(conv), from_layer(nn.Linear(21, 4)))


def test_a_linear_layer_of_another_width_is_refused() -> None:
    with pytest.raises(ReparamError, match=r"20 inputs in 0 dimensions cannot follow one of 21 outputs"):
        pool_to_linear(from_layer(nn.Conv2d(9, 21, 1)), from_layer(nn.Linear(20, 4)))
