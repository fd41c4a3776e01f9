"""Identities and regions of an exported graph are removed where no value changes; random operators are refused."""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d, stochastic_depth

from kdexport.errors import ReparamError
from kdexport.reparam.program import FusedProgram, fuse_module
from tests.kdexport.hostile_values import noise, relative_difference
from tests.kdexport.reparam.foreign_blocks import Forward, conv_bn, ready

SHAPE = (2, 3, 9, 8)


def fuse(run: Callable[[Any, Tensor], Any], **parts: nn.Module) -> FusedProgram:
    """Fuse a network of ``run`` and compare it with itself at other batches."""
    net = ready(Forward(run, **parts))
    net.register_parameter("gain", nn.Parameter(torch.tensor(0.7, dtype=torch.float64)))
    fused = fuse_module(net, (noise(*SHAPE),))
    for batch in (1, 3):
        x = noise(batch, *SHAPE[1:], seed=batch)
        with torch.no_grad():
            assert relative_difference(fused.module(x), net(x)) < 1e-12
    assert fused.after.multiply_accumulates <= fused.before.multiply_accumulates
    return fused


IDENTITIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dropout": lambda m, x: m.norm(functional.dropout(m.conv(x), 0.3, False)),
    "dropout in place": lambda m, x: m.norm(functional.dropout(m.conv(x), 0.3, False, inplace=True)),
    "dropout of channels": lambda m, x: m.norm(functional.dropout2d(m.conv(x), 0.3, False)),
    "alpha dropout": lambda m, x: m.norm(functional.alpha_dropout(m.conv(x), 0.3, False)),
    "dropout of probability zero": lambda m, x: m.norm(functional.dropout(m.conv(x), 0.0, True)),
    "stochastic depth in evaluation mode": lambda m, x: m.norm(stochastic_depth(m.conv(x), 0.3, "row", False)),
    "a cast to the same type": lambda m, x: m.norm(m.conv(x).to(x.dtype).type_as(x)),
    "a copy": lambda m, x: m.norm(m.conv(x).clone().contiguous().detach()),
    "leaky ReLU of slope 1": lambda m, x: m.norm(functional.leaky_relu(m.conv(x), 1.0)),
    "times one": lambda m, x: m.norm(m.conv(x) * 1.0 / 1),
    "padding by nothing": lambda m, x: m.norm(functional.pad(m.conv(x), (0, 0, 0, 0))),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_an_identity_between_a_convolution_and_its_batch_norm_disappears(name: str) -> None:
    fused = fuse(IDENTITIES[name], conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4, eps=1e-2))
    assert fused.after.operators == {"conv2d": 1}


def test_dropout_on_a_branch_keeps_no_second_convolution_alive() -> None:
    """Layer scale and dropout beside a residual, as in ConvNeXt, PoolFormer and FastViT."""
    fused = fuse(
        lambda m, x: x + m.gain * m.drop(m.norm(m.conv(functional.relu(x)))),
        conv=nn.Conv2d(3, 3, 3, padding=1), norm=nn.BatchNorm2d(3), drop=nn.Dropout(0.1),
    )  # fmt: skip
    assert fused.after.operators == {"add": 1, "conv2d": 1, "relu": 1}
    assert fused.after.multiply_accumulates == fused.before.multiply_accumulates


def test_a_copy_that_a_view_needs_stays() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x).transpose(2, 3).contiguous()
        return cast(Tensor, y.view(x.shape[0], -1))

    fused = fuse(run, conv=conv_bn(3, 4, 3))
    assert fused.after.operators["conv2d"] == 1


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.conv(x)
        with torch.autocast("cpu", enabled=False):
            y = y.add_(m.other(x))
    return cast(Tensor, m.norm(y))


def without_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y, z = m.conv(x), m.other(x)
    return cast(Tensor, m.norm(y - z))


@pytest.mark.parametrize("run", [without_gradient, without_autocast])
def test_a_region_that_changes_no_value_becomes_part_of_the_graph(run: Any) -> None:
    fused = fuse(run, conv=nn.Conv2d(3, 4, 3), other=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
    assert fused.after.operators == {"conv2d": 1}


NUMBERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "float": lambda m, x: m.norm(m.conv(x)) * float(m.gain),
    "item": lambda m, x: m.norm(m.conv(x)) * m.gain.item(),
    "computed": lambda m, x: m.norm(m.conv(x)) * (2.5 * float(m.gain.exp()) - 1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_read_from_a_weight_is_merged_as_a_scale(name: str) -> None:
    fused = fuse(NUMBERS[name], conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
    assert fused.after.operators == {"conv2d": 1}


def test_a_slope_that_is_read_from_a_weight_is_kept() -> None:
    fused = fuse(lambda m, x: functional.leaky_relu(m.conv(x), float(m.gain)), conv=conv_bn(3, 4, 3))
    assert fused.after.operators == {"conv2d": 1, "leaky_relu": 1}


RANDOM: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "stochastic depth": (lambda m, x: m.conv(x) + stochastic_depth(m.conv(x), 1e-6, "row", True), "bernoulli"),
    "rand": (lambda m, x: m.conv(x) + 1e-30 * torch.rand(1, dtype=x.dtype), "rand"),
    "randn_like": (lambda m, x: m.conv(x) + 1e-30 * torch.randn_like(x[:, :1, :1, :1]), "randn_like"),
    "normal": (lambda m, x: m.conv(x) + 1e-30 * torch.normal(0.0, 1.0, (1,)), "normal"),
    "multinomial": (lambda m, x: m.conv(x) + torch.multinomial(x.new_ones(1), 1).to(x), "multinomial"),
    "in place": (lambda m, x: m.conv(x) + torch.zeros_like(x[:, :1, :1, :1]).uniform_(0, 1e-30), "uniform"),
    "permutation": (lambda m, x: m.conv(x) + torch.randperm(1).to(x), "randperm"),
    "attention dropout": (
        lambda m, x: functional.scaled_dot_product_attention(m.conv(x), m.conv(x), m.conv(x), None, 1e-9),
        "scaled_dot_product_attention",
    ),
    "randomized ReLU": (lambda m, x: functional.rrelu(m.conv(x), 0.3, 0.3 + 1e-12, training=True), "rrelu"),
}  # fmt: skip


@pytest.mark.parametrize("name", RANDOM)
def test_an_operator_that_draws_numbers_is_refused_by_name_whatever_it_draws(name: str) -> None:
    run, operator = RANDOM[name]
    net = ready(Forward(run, conv=conv_bn(3, 4, 3)))
    with pytest.raises(ReparamError, match=rf"^{operator}\S* .*draws random numbers") as caught:
        fuse_module(net, (noise(*SHAPE),))
    assert "training=self.training" in caught.value.remedy


@pytest.mark.parametrize("active", [functional.dropout, functional.dropout2d])
def test_functional_dropout_that_ignores_evaluation_mode_is_refused(active: Any) -> None:
    net = ready(Forward(lambda m, x: active(m.conv(x), 0.2), conv=conv_bn(3, 4, 3)))
    with pytest.raises(ReparamError, match="dropout is active") as caught:
        fuse_module(net, (noise(*SHAPE),))
    assert "training=self.training" in caught.value.remedy


QUIET: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "attention without dropout": lambda m, x: functional.scaled_dot_product_attention(*[m.conv(x).flatten(2)] * 3),
    "randomized ReLU in evaluation mode": lambda m, x: functional.rrelu(m.conv(x), 0.1, 0.3, training=False),
    "noise that no output reads": lambda m, x: (torch.rand_like(x), m.conv(x))[1],
}


@pytest.mark.parametrize("name", QUIET)
def test_what_draws_nothing_that_an_output_reads_is_taken(name: str) -> None:
    assert "batch_norm" not in fuse(QUIET[name], conv=conv_bn(3, 4, 3)).after.operators


def test_a_recurrent_layer_without_dropout_draws_nothing() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.cell = conv_bn(3, 4, 3), nn.LSTM(6, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.cell(self.conv(x).mean(2))[0])

    net = ready(Recurrent())
    fused = fuse_module(net, (noise(*SHAPE),))
    assert "batch_norm" not in fused.after.operators


def test_a_frozen_batch_norm_counts_as_one() -> None:
    norm = FrozenBatchNorm2d(4, eps=1e-3)
    for index, buffer in enumerate(norm.buffers()):
        buffer.copy_(noise(4, seed=index).abs() + 0.1)
    net = copy.deepcopy(nn.Sequential(nn.Conv2d(3, 4, 3), norm)).double().eval()
    fused = fuse_module(net, (noise(*SHAPE),))
    assert fused.after.operators == {"conv2d": 1}
    x = noise(3, *SHAPE[1:], seed=4)
    assert relative_difference(fused.module(x).detach(), net(x).detach()) < 1e-12
