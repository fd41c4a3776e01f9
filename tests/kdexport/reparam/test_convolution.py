"""Every identity on random layers, in float64 at 1e-12, against the layers themselves."""

import random
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdexport.errors import ReparamError
from kdexport.reparam.compose import add, compose, composed_weights, concatenate, expand_groups
from kdexport.reparam.convolution import (
    Convolution,
    fold_norm,
    from_batch_norm,
    from_layer,
    identity,
    scale,
    shift,
)
from tests.kdexport.hostile_values import noise
from tests.kdexport.reparam.layers_as_data import apply, average_pool
from tests.kdexport.reparam.random_layers import (
    MODES,
    NORMS,
    POOLS,
    Pad,
    assert_same,
    hostile,
    random_conv,
    random_norm,
    same_size_conv,
    sizes,
)

SEEDS = st.integers(0, 2**32 - 1)
DIMS = st.sampled_from([1, 2, 2, 2, 3])
MANY = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def padded(branch: nn.Module) -> Convolution:
    """What ``same_size_conv`` made, as data."""
    front, layer = cast(nn.Sequential, branch)
    front = cast(Pad, front)
    return replace(from_layer(layer), padding=front.pairs, padding_mode=cast(Any, front.mode))


@MANY
@given(SEEDS, DIMS)
def test_a_layer_as_data_computes_what_the_layer_does(seed: int, dims: int) -> None:
    rng = random.Random(seed)
    layer = hostile(random_conv(rng, dims, inputs=12, outputs=rng.choice([4, 6, 12, 24])), seed)
    assert_same(from_layer(layer), layer, sizes(rng, dims))


@MANY
@given(SEEDS, DIMS)
def test_a_batch_norm_folds_into_any_convolution(seed: int, dims: int) -> None:
    rng = random.Random(seed)
    conv, norm = random_conv(rng, dims, inputs=6, outputs=12), random_norm(rng, dims, 12)
    net = hostile(nn.Sequential(conv, norm), seed)
    assert_same(fold_norm(from_layer(conv), cast(Any, norm)), net, sizes(rng, dims))


@MANY
@given(SEEDS, DIMS)
def test_a_batch_norm_alone_is_a_depthwise_convolution(seed: int, dims: int) -> None:
    rng = random.Random(seed)
    norm = hostile(random_norm(rng, dims, 5), seed)
    assert_same(from_batch_norm(cast(Any, norm), dims), norm, sizes(rng, dims))


@MANY
@given(SEEDS, DIMS)
def test_a_linear_layer_takes_its_batch_norm(seed: int, dims: int) -> None:
    linear, norm = nn.Linear(7, 5, bias=seed % 2 == 0), nn.BatchNorm1d(5, eps=1e-2, affine=seed % 3 > 0)
    net = hostile(nn.Sequential(linear, norm), seed)
    assert_same(fold_norm(from_layer(linear), norm), net, [()])


@MANY
@given(SEEDS, DIMS)
def test_average_pooling_is_a_convolution(seed: int, dims: int) -> None:
    rng = random.Random(seed)
    kernel = tuple(rng.randint(1, 4) for _ in range(dims))
    options: dict[str, Any] = {"stride": tuple(rng.randint(1, 3) for _ in range(dims))}
    options["padding"] = tuple(rng.randint(0, k // 2) for k in kernel)
    if dims > 1 and rng.random() < 0.5:
        options |= {"divisor_override": rng.randint(1, 9), "count_include_pad": rng.random() < 0.5}
    pool = POOLS[dims - 1](kernel, **options)
    assert_same(average_pool(pool, 3), pool, sizes(rng, dims))


@MANY
@given(SEEDS, DIMS)
def test_parallel_branches_of_any_kernels_dilations_paddings_and_groups_are_one(seed: int, dims: int) -> None:
    rng = random.Random(seed)
    stride, mode = tuple(rng.randint(1, 3) for _ in range(dims)), rng.choice(MODES)
    branches = [
        same_size_conv(rng, dims, inputs=12, outputs=12, stride=stride, padding_mode=mode)
        for _ in range(rng.randint(1, 3))
    ]
    branches.append(same_size_conv(rng, dims, inputs=12, outputs=12, stride=stride, kernel_size=(1,) * dims))
    norms = [random_norm(rng, dims, 12) for _ in branches]
    coefficients = [rng.uniform(-2, 2) for _ in branches]
    for index, (branch, norm) in enumerate(zip(branches, norms, strict=True)):
        hostile(nn.Sequential(branch, norm), seed + index)

    def reference(x: Tensor) -> Tensor:
        outputs = [c * norm(branch(x)) for c, branch, norm in zip(coefficients, branches, norms, strict=True)]
        return cast(Tensor, sum(outputs))

    convs = [fold_norm(padded(branch), cast(Any, norm)) for branch, norm in zip(branches, norms, strict=True)]
    assert_same(add(*convs, coefficients=coefficients), reference, sizes(rng, dims))
    assert_same(concatenate(*convs), lambda x: torch.cat([apply(conv, x) for conv in convs], 1), sizes(rng, dims))


@pytest.mark.parametrize("groups", [1, 2, 4, 12])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (4, 2)])
def test_the_identity_joins_a_kernel_of_any_groups(kernel: tuple[int, int], groups: int) -> None:
    rng = random.Random(groups)
    branch = hostile(
        same_size_conv(rng, 2, inputs=12, outputs=12, stride=(1, 1), kernel_size=kernel, groups=groups), groups
    )
    merged = add(padded(branch), identity(12, 2))
    assert merged.groups == groups
    assert_same(merged, lambda x: branch(x) + x, sizes(rng, 2))


@MANY
@given(SEEDS, DIMS)
def test_a_sequence_whose_second_layer_does_not_pad_is_one_convolution(seed: int, dims: int) -> None:
    rng = random.Random(seed)
    middle = rng.choice([4, 6, 12])
    first = random_conv(rng, dims, inputs=12, outputs=middle, kernel_size=tuple(rng.randint(1, 3) for _ in range(dims)))
    second = random_conv(rng, dims, inputs=middle, outputs=12, kernel_size=(rng.randint(1, 3),) * dims, padding=0)
    norms = [random_norm(rng, dims, middle), random_norm(rng, dims, 12)]
    net = hostile(nn.Sequential(first, norms[0], second, norms[1]), seed)
    one, two = fold_norm(from_layer(first), cast(Any, norms[0])), fold_norm(from_layer(second), cast(Any, norms[1]))
    merged = compose(one, two)
    assert composed_weights(one, two) == merged.weight.numel()
    assert_same(merged, net, [tuple(side + 14 for side in size) for size in sizes(rng, dims)])


@MANY
@given(SEEDS, DIMS)
def test_a_pointwise_layer_without_shift_may_be_padded_afterwards(seed: int, dims: int) -> None:
    rng = random.Random(seed)
    first = random_conv(
        rng, dims, inputs=12, outputs=6, kernel_size=(1,) * dims, padding=0, bias=False, padding_mode="zeros"
    )
    second = random_conv(rng, dims, inputs=6, outputs=12, padding_mode="zeros")
    net = hostile(nn.Sequential(first, second), seed)
    # A stride of 3 must leave the widest kernel its room.
    inputs = [tuple(side + 14 for side in size) for size in sizes(rng, dims)]
    assert_same(compose(from_layer(first), from_layer(second)), net, inputs)


@MANY
@given(SEEDS, DIMS)
def test_a_border_that_is_not_of_zeros_passes_through_a_pointwise_layer_with_its_shift(seed: int, dims: int) -> None:
    rng = random.Random(seed)
    first = random_conv(
        rng, dims, inputs=12, outputs=6, kernel_size=(1,) * dims, stride=(1,) * dims, padding=0, bias=True
    )
    second = random_conv(rng, dims, inputs=6, outputs=12, padding_mode=rng.choice(MODES[1:]))
    net = hostile(nn.Sequential(first, second), seed)
    assert_same(compose(from_layer(first), from_layer(second)), net, sizes(rng, dims))


@MANY
@given(SEEDS)
def test_a_full_convolution_without_shift_may_be_padded_afterwards(seed: int) -> None:
    """Beyond a border as wide as its kernel, a convolution computes zeros."""
    rng = random.Random(seed)
    kernel, dilation = (rng.randint(1, 3), rng.randint(1, 3)), (rng.randint(1, 2), rng.randint(1, 2))
    stride = (rng.randint(1, 3), rng.randint(1, 3))
    spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    before = [max(span - (s - 1), 0) for span, s in zip(spans, stride, strict=True)]
    front = Pad([before[1], spans[1], before[0], spans[0]])
    layer = nn.Conv2d(4, 6, kernel, stride, dilation=dilation, bias=False, groups=rng.choice([1, 2]))
    second = random_conv(rng, 2, inputs=6, outputs=4, padding_mode="zeros", padding=(1, 2))
    net = hostile(nn.Sequential(front, layer, second), seed)
    merged = compose(padded(nn.Sequential(front, layer)), from_layer(second))
    assert_same(merged, net, [(23, 31), (24, 30), (25, 29), (26, 28)])


@pytest.mark.parametrize("sides", [(1, 1, 1, 1), (2, 0, 1, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_an_intermediate_padded_with_the_shift_of_its_batch_norm_is_one_convolution(
    sides: tuple[int, ...], stride: int
) -> None:
    conv, norm = nn.Conv2d(6, 8, 1, bias=False, groups=2), nn.BatchNorm2d(8, eps=1e-3)
    last = nn.Conv2d(8, 4, 3, stride, groups=2)
    hostile(nn.Sequential(conv, norm, last), 3)
    first = fold_norm(from_layer(conv), norm)
    value = norm(torch.zeros(1, 8, 1, 1, dtype=torch.float64)).detach()

    def reference(x: Tensor) -> Tensor:
        # Padding what is left after the shift, and adding the shift again.
        return cast(Tensor, last(nn.functional.pad(norm(conv(x)) - value, sides) + value))

    pad = replace(identity(8, 2), padding=Pad(sides).pairs)
    merged = compose(compose(first, pad, border=value.flatten()), from_layer(last))
    assert_same(merged, reference, [(9, 11), (10, 7)])
    with pytest.raises(ReparamError, match="values other than that shift"):
        compose(first, pad)


@MANY
@given(SEEDS, DIMS)
def test_scale_shift_and_groups(seed: int, dims: int) -> None:
    rng = random.Random(seed)
    layer = hostile(random_conv(rng, dims, inputs=12, outputs=12), seed)
    conv, factor, offset = from_layer(layer), noise(12, seed=seed % 97), noise(12, seed=seed % 89)
    column = (-1, *[1] * dims)
    assert_same(
        shift(scale(scale(conv, factor), -1.5), offset),
        lambda x: layer(x) * factor.reshape(column) * -1.5 + offset.reshape(column),
        sizes(rng, dims),
    )
    fewer = rng.choice([g for g in range(1, conv.groups + 1) if conv.groups % g == 0])
    assert_same(expand_groups(conv, fewer), layer, sizes(rng, dims))


@MANY
@given(SEEDS, DIMS)
def test_a_layer_behind_any_padding_as_data_computes_the_same(seed: int, dims: int) -> None:
    rng = random.Random(seed)
    mode = rng.choice(MODES)
    branch = hostile(same_size_conv(rng, dims, inputs=6, outputs=6, stride=(2,) * dims, padding_mode=mode), seed)
    assert_same(padded(branch), branch, sizes(rng, dims))


def conv2d(inputs: int = 4, outputs: int = 4, kernel: int = 3, **options: Any) -> Convolution:
    return from_layer(hostile(nn.Conv2d(inputs, outputs, kernel, **options), 4))


@pytest.mark.parametrize(
    ("merge", "fact"),
    [
        (lambda: add(conv2d(padding=1), conv2d(padding=0)), "slack"),
        (lambda: add(conv2d(padding=1), conv2d(padding=1, stride=2)), "stride"),
        (lambda: add(conv2d(padding=1), conv2d(outputs=6, padding=1)), r"\[4, 6\] channels"),
        (lambda: add(conv2d(padding=1), conv2d(inputs=6, padding=1)), "channels"),
        (lambda: add(conv2d(padding=1), conv2d(padding=1, padding_mode="reflect")), "reflect, zeros"),
        (lambda: add(), "cannot be summed"),
        (lambda: compose(conv2d(kernel=1), conv2d(padding=1)), "values other than that shift"),
        (lambda: compose(conv2d(bias=False), conv2d(padding=1)), "would not compute zeros"),
        (lambda: compose(conv2d(padding=1, bias=False), conv2d(padding=1)), "would not compute zeros"),
        (lambda: compose(conv2d(), conv2d(padding=1, padding_mode="circular")), "continues its output"),
        (lambda: compose(conv2d(kernel=1, stride=2), conv2d(padding=1, padding_mode="reflect")), "continues its"),
        (lambda: compose(conv2d(padding=1, padding_mode="reflect"), conv2d(padding=1)), "padded by reflect"),
        (lambda: compose(conv2d(), conv2d(inputs=6)), "6 inputs"),
        (lambda: expand_groups(conv2d(groups=4), 3), "4 groups as one with 3: 3 must divide 4"),
        (lambda: average_pool(nn.AvgPool2d(3, 1, 1, count_include_pad=False), 4), "count_include_pad=False"),
        (lambda: average_pool(nn.AvgPool2d(3, 2, ceil_mode=True), 4), "ceil_mode"),
        (lambda: fold_norm(conv2d(), nn.BatchNorm2d(4)), "training mode"),
        (lambda: fold_norm(conv2d(), nn.BatchNorm2d(6).eval()), "6 channels"),
        (lambda: fold_norm(conv2d(), nn.BatchNorm2d(4, track_running_stats=False).eval()), "running statistics"),
        (lambda: replace(conv2d(), padding=((1, -1), (0, 0))), "no exact form"),
        (lambda: replace(conv2d(), padding_mode=cast(Any, "mirror")), "'mirror'"),
        (lambda: replace(conv2d(), groups=3), "3 groups does not exist"),
        (lambda: replace(conv2d(), stride=(1,)), r"stride \(1,\)"),
    ],
)  # fmt: skip
def test_what_has_no_exact_merge_is_refused_with_its_reason(merge: Any, fact: str) -> None:
    with pytest.raises(ReparamError, match=fact) as caught:
        merge()
    assert caught.value.remedy


def test_a_convolution_padded_like_the_normal_pooling_needs_no_ceiling_at_stride_one() -> None:
    pool = nn.AvgPool2d(3, 1, 1, ceil_mode=True)
    assert_same(average_pool(pool, 2), pool, [(7, 9), (8, 6)])


def test_every_kind_of_batch_norm_is_known() -> None:
    for dims, kind in enumerate(NORMS, 1):
        norm = hostile(kind(3), dims)
        assert_same(from_batch_norm(cast(Any, norm), dims), norm, [(9, 7, 5)[:dims]])
