"""Blocks of other projects through torch.export: each becomes one convolution, and what may not be merged stays."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

from kdexport.errors import CertificateError, ReparamError
from kdexport.reparam import compose as parallel
from kdexport.reparam import compose as sequence
from kdexport.reparam import convolution as layers
from kdexport.reparam import dataflow as paths
from kdexport.reparam import operators as reading
from kdexport.reparam.program import FusedProgram, fuse_module
from tests.kdexport.hostile_values import noise, relative_difference
from tests.kdexport.reparam.foreign_blocks import (
    Asymmetric,
    Diverse,
    Forward,
    MobileOne,
    RepVgg,
    conv_bn,
    ready,
    whole_net,
)

LIMIT = 1e-12
SHAPE = (2, 6, 9, 12)


def fuse(
    net: nn.Module, shape: Sequence[int] = SHAPE, others: Sequence[Sequence[int]] = ((1, 6, 9, 12),)
) -> FusedProgram:
    """Fuse ``net`` and compare it with itself on fresh noise, for other batch sizes too; the original is untouched."""
    before = copy.deepcopy(net.state_dict())
    fused = fuse_module(net, (noise(*shape, seed=1),))
    for size in (shape, *others):
        x = noise(*size, seed=11)
        with torch.no_grad():
            wanted, found = net(x), fused.module(x)
        assert relative_difference(found, wanted) < LIMIT
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert fused.after.multiply_accumulates <= fused.before.multiply_accumulates
    assert fused.after.parameters <= fused.before.parameters
    return fused


def reasons(fused: FusedProgram) -> str:
    return "\n".join(f"{item.place}: {item.reason}" for item in fused.left_alone)


@pytest.mark.parametrize(
    ("block", "activation"),
    [
        (RepVgg(6, 6), "relu"),
        (RepVgg(6, 12, stride=2, groups=3), "relu"),
        (RepVgg(6, 6, groups=2), "relu"),
        (MobileOne(6, 6, 3, branches=4, groups=6), "gelu"),
        (MobileOne(6, 6, 3, branches=3, stride=2, groups=6), "gelu"),
        (MobileOne(6, 6, 1, branches=4), "gelu"),
        (MobileOne(6, 10, 1, branches=2), "gelu"),
        (Asymmetric(6, 8), "silu"),
        (Asymmetric(6, 6, kernel=5, stride=2, groups=6), "silu"),
        (Diverse(6, 6, stride=2), "relu"),
        (Diverse(6, 8, border="lifted"), "relu"),
        (Diverse(6, 8, border="before"), "relu"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_block_of_another_project_becomes_one_convolution(block: nn.Module, activation: str) -> None:
    fused = fuse(ready(nn.Sequential(block)))
    assert fused.after.operators == {"conv2d": 1, activation: 1}
    place = "0.convs" if isinstance(block, MobileOne) and block.scale is None and block.skip is None else "0"
    assert sorted(name for name, _ in fused.module.named_parameters()) == [f"{place}.bias", f"{place}.weight"]
    assert not list(fused.module.buffers())
    (found,) = fused.certificate.blocks
    assert found.name == place
    assert "branches" in found.kind
    assert found.relative_error < LIMIT


def test_a_net_of_such_blocks_names_them_by_their_paths_and_costs_what_the_plain_one_does() -> None:
    net = ready(
        whole_net(
            [RepVgg(3, 6, 2), MobileOne(6, 6, 3, 2, groups=6), MobileOne(6, 8, 1, 2), Diverse(8, 8, border="before")], 8
        )
    )
    fused = fuse(net, (2, 3, 17, 15), [(3, 3, 17, 15)])
    assert [block.name for block in fused.certificate.blocks] == ["0", "1", "2.convs", "3"]
    assert fused.after.operators["conv2d"] == 4
    assert "batch_norm" not in fused.after.operators
    plain = 9 * 8 * 6 * 3 * 9 + 9 * 8 * 6 * 9 + 9 * 8 * 6 * 8 + 9 * 8 * 8 * 8 * 9 + 8 * 5
    assert fused.after.multiply_accumulates == plain
    assert fused.certificate.fused_parameters == fused.after.parameters < fused.before.parameters
    assert fused.certificate.holds


def decomposed(net: nn.Module, shape: Sequence[int]) -> ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (noise(*shape),), dynamic_shapes=({0: batch},))
    return cast(ExportedProgram, program.run_decompositions())


@pytest.mark.parametrize("block", [RepVgg(6, 6), Diverse(6, 8, border="before")], ids=["RepVgg", "Diverse"])
def test_a_decomposed_program_is_merged_as_well(block: nn.Module) -> None:
    net = ready(nn.Sequential(block))
    program = decomposed(net, SHAPE)
    fused = fuse_module(program)
    assert fused.after.operators == {"conv2d": 1, "relu": 1}
    x = noise(3, *SHAPE[1:], seed=5)
    assert relative_difference(fused.module(x).detach(), net(x).detach()) < LIMIT
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)


def mean_of(m: Any, x: Tensor) -> Tensor:
    return torch.stack([branch(x) for branch in (m.a, m.b, m.c)]).mean(0)


SUMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "stack and mean": mean_of,
    "stack along another axis and sum": lambda m, x: torch.stack([m.a(x), m.b(x), m.c(x)], 2).sum(2),
    "coefficients": lambda m, x: 0.25 * m.a(x) - m.b(x) / 3 + torch.add(x, m.c(x), alpha=-2.5),
    "in place": lambda m, x: (m.a(x).add_(m.b(x))).sub_(m.c(x)).relu_(),
    "nested sums and a batch norm behind": lambda m, x: m.norm((m.a(x) + (m.b(x) + x)) + m.c(x)),
    "scaled per channel": lambda m, x: m.a(x) * m.norm.weight.view(1, -1, 1, 1) + m.b(x) + m.c(x) + 1.5,
    "negated, cloned and made contiguous": lambda m, x: -m.a(x).clone() + m.b(x).contiguous() + m.c(x).detach(),
    "one side after the other": lambda m, x: torch.cat([m.a(x), m.b(x) + m.c(x)], 1),
}  # fmt: skip


DECOMPOSED = ["stack and mean", "stack along another axis and sum"]


@pytest.mark.parametrize(
    ("run", "decompose"),
    [*((run, False) for run in SUMS.values()), *((SUMS[name], True) for name in DECOMPOSED)],
    ids=[*SUMS, *(f"{name}, decomposed" for name in DECOMPOSED)],
)
def test_a_sum_is_found_however_it_is_written(run: Callable[[Any, Tensor], Tensor], decompose: bool) -> None:
    net = ready(
        Forward(run, a=conv_bn(6, 6, 3, padding=1), b=conv_bn(6, 6, 3, padding=1), c=conv_bn(6, 6, 3, padding=1),
                norm=nn.BatchNorm2d(6))
    )  # fmt: skip
    if decompose:
        fused = fuse_module(decomposed(net, SHAPE))
        x = noise(3, *SHAPE[1:])
        assert relative_difference(fused.module(x).detach(), net(x).detach()) < LIMIT
    else:
        fused = fuse(net)
    assert {name: n for name, n in fused.after.operators.items() if name != "relu"} == {"conv2d": 1}


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet18", {}), ("mobilenet_v2", {"inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]})],
)
def test_a_plain_net_loses_its_batch_norms_and_nothing_else(name: str, options: dict[str, Any]) -> None:
    net = ready(getattr(torchvision.models, name)(num_classes=7, **options))
    fused = fuse(net, (2, 3, 33, 35), [])
    wanted = {key: count for key, count in fused.before.operators.items() if key != "batch_norm"}
    assert fused.after.operators == wanted
    assert fused.after.multiply_accumulates == fused.before.multiply_accumulates
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(fused.certificate.blocks) == len(convs)
    assert {block.name for block in fused.certificate.blocks} <= {path for path, _ in net.named_modules()}


def test_linear_layers_take_their_batch_norms_and_their_parallel_branches() -> None:
    net = ready(
        Forward(
            lambda m, x: m.head(functional.relu(m.norm(m.first(x)) + m.other(x) + x)),
            first=nn.Linear(6, 6, bias=False), norm=nn.BatchNorm1d(6), other=nn.Linear(6, 6), head=nn.Linear(6, 3),
        )
    )  # fmt: skip
    fused = fuse(net, (4, 6), [(2, 6)])
    assert fused.after.operators == {"linear": 2, "relu": 1}


@pytest.mark.parametrize("dims", [1, 3])
def test_one_and_three_dimensions(dims: int) -> None:
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv3d, nn.BatchNorm3d)
    net = ready(
        Forward(
            lambda m, x: functional.relu(m.norm(m.wide(x)) + m.point(x) + m.skip(x)),
            wide=conv(6, 6, 3, padding=2, dilation=2, groups=2), norm=norm(6), point=conv(6, 6, 1), skip=norm(6),
        )
    )  # fmt: skip
    shape = (2, 6, 9, 7, 8)[: dims + 2]
    # The ungrouped 1x1 would make the grouped kernel dense: it stays beside the rest.
    assert fuse(net, shape, []).after.operators == {f"conv{dims}d": 2, "add": 1, "relu": 1}


def test_padding_around_a_kernel_becomes_its_own_and_an_asymmetric_one_is_written_before_it() -> None:
    net = ready(
        Forward(
            lambda m, x: functional.relu(m.a(functional.pad(x, (1, 1, 2, 2))) + m.b(functional.pad(x, (0, 2, 4, 0)))),
            a=conv_bn(6, 6, (5, 3)), b=conv_bn(6, 6, (5, 3)),
        )
    )  # fmt: skip
    fused = fuse(net)
    assert fused.after.operators == {"conv2d": 1, "pad": 1, "relu": 1} or fused.after.operators["conv2d"] == 2
    single = fuse(ready(nn.Sequential(nn.ZeroPad2d((1, 1, 2, 2)), conv_bn(6, 4, (5, 3)))))
    assert single.after.operators == {"conv2d": 1}


def test_a_batch_norm_before_a_layer_folds_forward_where_the_border_allows_and_stays_elsewhere() -> None:
    forward = fuse(ready(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3))))
    assert forward.after.operators == {"conv2d": 1, "relu": 1}
    alone = fuse(ready(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1))))
    assert alone.after.operators == {"batch_norm": 1, "conv2d": 1, "relu": 1}
    assert alone.certificate.blocks == ()
    assert "values other than that shift" in reasons(alone)
    assert "1: The batch norm follows relu, which is not a convolution or linear layer with no other reader" in reasons(
        alone
    )


def test_a_sequence_is_merged_only_where_it_saves_work() -> None:
    bottleneck = fuse(ready(nn.Sequential(conv_bn(6, 2, 1), conv_bn(2, 6, 1), nn.ReLU())))
    assert bottleneck.after.operators == {"conv2d": 2, "relu": 1}
    assert [block.name for block in bottleneck.certificate.blocks] == ["0.0", "1.0"]
    separable = fuse(ready(nn.Sequential(conv_bn(6, 6, 3, groups=6), conv_bn(6, 4, 1))))
    assert separable.after.operators == {"conv2d": 2}
    inflated = fuse(ready(nn.Sequential(conv_bn(6, 24, 1), conv_bn(24, 6, 1))))
    assert inflated.after.operators == {"conv2d": 1}
    transition = fuse(ready(nn.Sequential(conv_bn(6, 4, 1), nn.AvgPool2d(2))))
    assert transition.after.operators == {"conv2d": 1, "avg_pool2d": 1}


def test_zeros_padded_after_a_shift_are_left_alone_and_the_other_branches_still_merge() -> None:
    fused = fuse(ready(nn.Sequential(Diverse(6, 8, border="zeros"))))
    assert fused.after.operators == {"add": 1, "conv2d": 3, "relu": 1}
    assert "values other than that shift" in reasons(fused)


@pytest.mark.parametrize(
    ("run", "operators", "reason"),
    [
        # Weights used at two places that are merged differently: the second merge would need weights of its own.
        (
            lambda m, x: functional.relu(m.a(x) + m.b[1](m.a[0](functional.relu(x)))),
            {"add": 1, "batch_norm": 2, "conv2d": 2, "relu": 2}, "a.0.weight is used at 2 places",
        ),
        # An intermediate value with another user.
        (
            lambda m, x: (lambda y: functional.relu(m.a[1](y)) + functional.gelu(y))(m.a[0](x)),
            {"add": 1, "batch_norm": 1, "conv2d": 1, "gelu": 1, "relu": 1}, "conv2d, whose output is read by 2",
        ),
        # Something non-linear in one branch.
        (
            lambda m, x: m.a(x) + m.b(functional.relu(x)), {"add": 1, "conv2d": 2, "relu": 1}, "",
        ),
        # Pooling that is no convolution at the border.
        (
            lambda m, x: m.a(x) + functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
            {"add": 1, "avg_pool2d": 1, "conv2d": 1}, "count_include_pad=False",
        ),
        # Dilated and dense kernels: the union would cost more.
        (
            lambda m, x: m.a(x) + m.wide(x), {"add": 1, "conv2d": 2}, "more multiply-accumulates",
        ),
        (lambda m, x: m.a(x) + m.wide(x) + m.b(x), {"add": 1, "conv2d": 2}, ""),
        # Kernels of four times the weights.
        (
            lambda m, x: functional.avg_pool2d(m.c(x), 2) + functional.avg_pool2d(m.d(x), 2),
            {"add": 1, "avg_pool2d": 2, "conv2d": 2}, "",
        ),
        (lambda m, x: m.a(x) * m.b(x), {"mul": 1, "conv2d": 2}, ""),
        (lambda m, x: m.a(x) + x[:, :, :1], {"add": 1, "conv2d": 1, "slice": 2}, ""),
        (lambda m, x: m.a(x) + x.mean((2, 3), keepdim=True), {"add": 1, "conv2d": 1, "mean": 1}, ""),
    ],
    ids=["shared", "reader", "relu", "pooling", "dilated", "the rest", "weights", "product", "slice", "broadcast"],
)  # fmt: skip
def test_what_may_not_be_merged_stays(run: Any, operators: dict[str, int], reason: str) -> None:
    net = Forward(
        run, a=conv_bn(6, 6, 3, padding=1), b=conv_bn(6, 6, 3, padding=1), wide=conv_bn(6, 6, 3, padding=3, dilation=3),
        c=conv_bn(6, 6, 1), d=conv_bn(6, 6, 1),
    )  # fmt: skip
    fused = fuse(ready(net))
    assert fused.after.operators == operators
    assert reason in reasons(fused)


def test_an_ordinary_residual_sum_is_no_reason_to_list() -> None:
    fused = fuse(ready(Forward(lambda m, x: functional.relu(x) + m.a(functional.gelu(x)), a=conv_bn(6, 6, 1))))
    assert fused.left_alone == ()


def both_views(m: Any, x: Tensor) -> Tensor:
    """The mean over an image and its mirror image, as in test-time augmentation."""
    return (functional.relu(m.a(x)) + functional.relu(m.a(x.flip(3)))) / 2


def standardised(m: Any, x: Tensor) -> Tensor:
    conv = m.a[0]
    flat = conv.weight.reshape(1, conv.out_channels, -1)
    weight = functional.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(conv.weight)
    return cast(Tensor, m.a[1](functional.conv2d(x, weight, conv.bias, padding=1)))


@pytest.mark.parametrize(
    ("run", "operators"),
    [
        (both_views, {"add": 1, "conv2d": 2, "div": 1, "flip": 1, "relu": 2}),
        (lambda m, x: functional.relu(m.a(x) + m.a(functional.relu(x))), {"add": 1, "conv2d": 2, "relu": 2}),
        (standardised, {"conv2d": 1}),
        (lambda m, x: functional.conv2d(x, m.a[0].weight.tanh(), padding=1), {"conv2d": 1}),
    ],
    ids=["augmentation", "siamese", "weight standardisation", "a computed weight"],
)
def test_weights_that_several_places_share_are_merged_once(run: Any, operators: dict[str, int]) -> None:
    fused = fuse(ready(Forward(run, a=conv_bn(6, 6, 3, padding=1))))
    assert fused.after.operators == operators
    assert sorted(name for name, _ in fused.module.named_parameters()) == ["a.0.bias", "a.0.weight"]


class Transposed(nn.Module):
    """Upsampling by a transposed convolution and its batch norm, in every geometry."""

    def __init__(self, dims: int, **options: Any) -> None:
        super().__init__()
        conv, norm = (nn.ConvTranspose1d, nn.BatchNorm1d), (nn.ConvTranspose2d, nn.BatchNorm2d)
        kinds = {1: conv, 2: norm, 3: (nn.ConvTranspose3d, nn.BatchNorm3d)}[dims]
        self.up = kinds[0](6, 4, 3, **options)
        self.norm = kinds[1](4, eps=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.up(x)))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "output_padding": 1, "padding": 1}, {"groups": 2, "stride": 3, "bias": False}, {"dilation": 2}],
    ids=str,
)
def test_a_transposed_convolution_takes_in_the_batch_norm_after_it(dims: int, options: dict[str, Any]) -> None:
    net = Transposed(dims, **options)
    with torch.no_grad():
        net.up.weight.copy_(noise(*net.up.weight.shape))
    fused = fuse(ready(net), (2, 6, 5, 4, 3)[: dims + 2], [])
    name = "conv_transpose" + f"{dims}d"
    assert fused.after.operators == {name: 1, "relu": 1}
    assert fused.after.multiply_accumulates == net.up.weight.numel() * (5, 20, 60)[dims - 1]
    assert [block.kind for block in fused.certificate.blocks] == ["transposed convolution + batch norm"]


def test_what_stands_around_a_transposed_convolution_is_left_alone_with_the_reason() -> None:
    net = nn.Sequential(conv_bn(6, 6, 1), nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(4, 6, 1), nn.ReLU())
    fused = fuse(ready(net))
    assert fused.after.operators == {"conv2d": 2, "conv_transpose2d": 1, "relu": 1}
    assert "absorbs only a scale and a shift per channel after it" in reasons(fused)


def test_a_batch_norm_behind_a_concatenation_folds_into_each_layer_of_it() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        parts = [m.a[0](x), m.b[0](functional.relu(x)), m.up(x)]
        return functional.relu(m.norm(torch.cat(parts, 1)))

    net = Forward(
        run, a=conv_bn(6, 3, 1), b=conv_bn(6, 5, 3, padding=1), up=nn.ConvTranspose2d(6, 2, 3, padding=1),
        norm=nn.BatchNorm2d(10, eps=1e-2),
    )  # fmt: skip
    fused = fuse(ready(net))
    assert fused.after.operators == {"cat": 1, "conv2d": 2, "conv_transpose2d": 1, "relu": 2}
    assert [block.name for block in fused.certificate.blocks] == ["a.0", "b.0", "up"]


def test_a_batch_norm_behind_a_concatenation_of_other_values_is_left_alone_with_the_reason() -> None:
    net = Forward(lambda m, x: functional.relu(m.norm(torch.cat([m.a[0](x), x], 1))), a=conv_bn(6, 3, 1),
                  norm=nn.BatchNorm2d(9))  # fmt: skip
    fused = fuse(ready(net))
    assert fused.after.operators == {"batch_norm": 1, "cat": 1, "conv2d": 1, "relu": 1}
    assert "norm: The batch norm follows cat, which is not a convolution" in reasons(fused)


def levit(m: Any, x: Tensor) -> Tensor:
    y = m.line(x.flatten(2).transpose(1, 2))
    return functional.hardswish(m.norm(y.flatten(0, 1)).reshape_as(y))


def reshaped(m: Any, x: Tensor) -> Tensor:
    y = m.line(x.flatten(2).transpose(1, 2))
    return functional.hardswish(m.norm(y.reshape(-1, 5)).view(x.shape[0], -1, 5))


@pytest.mark.parametrize("run", [levit, reshaped])
def test_a_batch_norm_behind_a_flattened_linear_layer_folds_into_it(run: Any) -> None:
    fused = fuse(ready(Forward(run, line=nn.Linear(6, 5, bias=False), norm=nn.BatchNorm1d(5, eps=1e-2))))
    assert "batch_norm" not in fused.after.operators
    assert [block.kind for block in fused.certificate.blocks] == ["linear layer + batch norm"]
    assert fused.after.multiply_accumulates == 9 * 12 * 6 * 5


def test_a_batch_norm_of_features_without_a_layer_is_left_alone_with_the_reason() -> None:
    net = Forward(lambda m, x: functional.relu(m.norm(functional.relu(x.mean((2, 3))))), norm=nn.BatchNorm1d(6))
    fused = fuse(ready(net))
    assert fused.after.operators == {"batch_norm": 1, "mean": 1, "relu": 2}
    assert "norm: The batch norm follows relu, which is not a convolution or linear layer" in reasons(fused)


def test_a_batch_norm_of_batch_statistics_is_left_alone_with_the_reason() -> None:
    net = ready(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), conv_bn(4, 6, 1)))
    fused = fuse(net, others=[])
    assert fused.after.operators == {"batch_norm": 1, "conv2d": 2}
    assert "statistics of the batch" in reasons(fused)


def test_training_mode_and_hooks_are_refused() -> None:
    net = ready(nn.Sequential(RepVgg(6, 6)))
    cast(Any, net)[0].dense.train()
    with pytest.raises(ReparamError, match=r"0\.dense is in training mode"):
        fuse_module(net, (noise(*SHAPE),))
    net.eval()
    cast(Any, net)[0].dense.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ReparamError, match=r"0\.dense has a forward hook"):
        fuse_module(net, (noise(*SHAPE),))


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("tail", [nn.BatchNorm2d(4), nn.Dropout(0.3)], ids=["batch norm", "dropout"])
def test_a_program_that_was_exported_in_training_mode_is_refused(tail: nn.Module, decompose: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), tail).train()
    program = torch.export.export(net, (torch.randn(2, 3, 7, 8),))
    with pytest.raises(ReparamError, match=r"training mode|writes to its buffers"):
        fuse_module(program.run_decompositions() if decompose else program)


@pytest.mark.parametrize(
    ("net", "inputs", "fact"),
    [
        (nn.Conv2d(6, 4, 3), None, "without example inputs"),
        (nn.Conv2d(6, 4, 3), (noise(2, 5, 9, 9),), r"cannot be run on inputs \(2, 5, 9, 9\), a batch of 2"),
        (Forward(lambda m, x: x * 2 if x.sum() > 0 else x), (noise(*SHAPE),), "cannot be exported"),
        (Forward(lambda m, x: x.reshape(2, -1)), (noise(*SHAPE),), "any batch size"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_reason(net: nn.Module, inputs: Any, fact: str) -> None:
    with pytest.raises(ReparamError, match=fact):
        fuse_module(net.double().eval(), inputs)


def test_a_region_of_another_precision_is_refused() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cast(Tensor, m.a(x))

    net = ready(Forward(run, a=conv_bn(6, 6, 3)), dtype=torch.float32)
    with pytest.raises(ReparamError, match=r"a separate region \(autocast\)"):
        fuse_module(net, (noise(*SHAPE).float(),))


def test_several_inputs_and_outputs_keep_their_structure() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.other, self.names = RepVgg(6, 6), conv_bn(6, 6, 1), nn.Embedding(9, 6)

        def forward(self, x: Tensor, y: Tensor, index: Tensor) -> dict[str, Any]:
            z = self.block(x) + self.other(y) + self.names(index)[:, :, None, None]
            return {"z": z, "rest": (z.mean((2, 3)), y * 2)}

    net = ready(Two())
    fused = fuse_module(net, (noise(2, 6, 8, 9), noise(2, 6, 8, 9), torch.tensor([3, 8])))
    assert fused.after.operators["conv2d"] == 2
    inputs = (noise(3, 6, 8, 9, seed=1), noise(3, 6, 8, 9, seed=2), torch.tensor([0, 5, 5]))
    with torch.no_grad():
        wanted, found = net(*inputs), fused.module(*inputs)
    assert relative_difference(found["z"], wanted["z"]) < LIMIT
    assert relative_difference(found["rest"][0], wanted["rest"][0]) < LIMIT
    assert torch.equal(found["rest"][1], wanted["rest"][1])


def wrong_placement(conv: Any, kernel: Any, dilation: Any, padding: Any) -> Tensor:
    right = PLACE(conv, kernel, dilation, padding)
    return right.roll(1, -1) if set(conv.kernel) == {1} else right


PLACE, ADD, COMPOSE, NORM = parallel._place, parallel.add, sequence.compose, layers.eval_norm
WRONG: dict[str, tuple[Any, str, Any]] = {
    "1x1 off centre": (parallel, "_place", wrong_placement),
    "a branch lost": (paths, "add", lambda *convs, coefficients: ADD(*convs[1:], coefficients=coefficients[1:])),
    "coefficients forgotten": (paths, "add", lambda *convs, coefficients: ADD(*convs)),
    "epsilon ignored": (reading, "eval_norm", lambda m, v, g, b, eps: NORM(m, v, g, b, 1e-5)),
    "mean ignored": (reading, "eval_norm", lambda m, v, g, b, eps: NORM(0 * m, v, g, b, eps)),
    "shift through the border": (sequence, "_require_border", lambda *_: None),
    "bias not carried": (
        paths, "compose", lambda a, b, border: COMPOSE(cast(Any, a).__class__(
            a.weight, 0 * a.bias, a.stride, a.dilation, a.padding, a.padding_mode, a.groups), b, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_merge_is_refused_by_a_certificate_that_names_the_block(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y, block = functional.relu(x), m.stage.block
        merged = torch.add(block.origin(y) + block.point(y), m.stage.extra(y), alpha=-0.5)
        return cast(Tensor, functional.relu(merged) + block._sequence(y))

    net = ready(Forward(run, stage=nn.ModuleDict({"block": Diverse(6, 6, border="zeros"), "extra": conv_bn(6, 6, 1)})))
    monkeypatch.setattr(*WRONG[name])
    with pytest.raises(CertificateError, match=r"worst block stage[. ]") as caught:
        fuse_module(net, (noise(*SHAPE),))
    assert caught.value.exit_code == 1


def test_the_result_shares_no_tensor_with_the_original() -> None:
    net = ready(nn.Sequential(RepVgg(6, 6), nn.Conv2d(6, 4, 1)))
    fused = fuse_module(net, (noise(*SHAPE),))
    originals = {value.data_ptr() for value in net.state_dict().values()}
    assert not originals & {value.data_ptr() for value in fused.module.state_dict().values()}
    assert not originals & {value.data_ptr() for value in fused.program.state_dict.values()}


def test_weights_are_rounded_once_to_the_type_of_the_original_and_overflow_is_refused() -> None:
    net = ready(nn.Sequential(RepVgg(6, 6)))
    exact = fuse_module(net, (noise(*SHAPE),))
    single = fuse_module(net.float(), (noise(*SHAPE).float(),))
    found = dict(single.module.named_parameters())["0.weight"]
    assert found.dtype == torch.float32
    assert relative_difference(found, dict(exact.module.named_parameters())["0.weight"]) < 1e-6
    assert single.certificate.whole_relative_error < LIMIT
    half = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).eval()
    cast(nn.BatchNorm2d, half[1]).weight.data.fill_(6e4)
    cast(nn.Conv2d, half[0]).weight.data.fill_(50)
    with pytest.raises(ReparamError, match=r"exceeds the range of torch\.float16"):
        fuse_module(half.half(), (torch.zeros(2, 2, 3, 3).half(),))


def test_a_merge_warns_of_dead_channels_and_of_the_range_that_they_blow_up() -> None:
    net = ready(nn.Sequential(RepVgg(6, 6)))
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        cast(Tensor, norm.running_var).uniform_(0.4, 1.7)
    assert fuse(net).certificate.hazards == ()
    norm = norms[1]
    path = next(name for name, module in net.named_modules() if module is norm)
    assert norm.running_var is not None
    norm.running_var[2] = 1e-11
    with torch.no_grad():
        norm.weight[2] = 6.0
    dead, blown = fuse(net).certificate.hazards
    assert (dead.layer, dead.kind, dead.measured) == (path, "dead channels", 1)
    assert "channel 2 has variance 1.0e-11" in dead.detail
    assert (blown.layer, blown.kind) == ("0", "int8 range")
    assert blown.measured > 16
