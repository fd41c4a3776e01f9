"""Wrong merges that people have shipped, put into the code one at a time: the comparison of the tests sees each."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from kdexport.errors import ReparamError
from kdexport.reparam import algebra
from kdexport.reparam import compose as parallel
from kdexport.reparam import compose as sequence
from kdexport.reparam import convolution as layers
from kdexport.reparam.compose import add, compose, concatenate, pool_to_linear
from kdexport.reparam.convolution import Convolution, fold_norm, from_batch_norm, from_layer, identity
from tests.kdexport.hostile_values import noise, relative_difference
from tests.kdexport.reparam.layers_as_data import average_pool
from tests.kdexport.reparam.random_layers import LIMIT, assert_same, hostile

SIZES = [(11, 14), (12, 13)]
Case = Callable[[], None]


def conv_and_norm() -> None:
    net = hostile(nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.BatchNorm2d(6, eps=1e-3)), 1)
    assert_same(fold_norm(from_layer(net[0]), net[1]), net, SIZES)  # type: ignore[index]


def norm_alone() -> None:
    norm = cast(nn.BatchNorm2d, hostile(nn.BatchNorm2d(5, eps=1e-2), 2))
    assert_same(from_batch_norm(norm, 2), norm, SIZES)


def parallel_block() -> None:
    """3x3 with dilation 2, 1x1, 2x3 without symmetry, in groups, and the identity."""
    wide = hostile(nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2), 3)
    point = hostile(nn.Conv2d(4, 4, 1, groups=4), 4)
    odd = hostile(nn.Conv2d(4, 4, (2, 3), padding="same"), 5)
    merged = add(
        *(from_layer(layer) for layer in (wide, point, odd)), identity(4, 2), coefficients=[0.5, -2.0, 1.5, 3.0]
    )
    assert_same(merged, lambda x: 0.5 * wide(x) - 2 * point(x) + 1.5 * odd(x) + 3 * x, SIZES)


def uneven_block() -> None:
    """Kernels of even extents, which lie behind their output position."""
    even, point = hostile(nn.Conv2d(4, 6, (2, 4), padding="same"), 15), hostile(nn.Conv2d(4, 6, 1), 16)
    assert_same(add(from_layer(even), from_layer(point)), lambda x: even(x) + point(x), SIZES)


def grouped_identity() -> None:
    conv = hostile(nn.Conv2d(6, 6, 3, padding=1, groups=3), 6)
    assert_same(add(from_layer(conv), identity(6, 2)), lambda x: conv(x) + x, SIZES)


def pooled() -> None:
    pool = nn.AvgPool2d((3, 2), (2, 1), (1, 1))
    assert_same(average_pool(pool, 4), pool, SIZES)


def uneven_divisor() -> None:
    """The pooling that is no convolution must be refused, whatever else is wrong."""
    pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    with pytest.raises(AssertionError):
        assert_same(layers.pool_convolution(4, (3, 3), (1, 1), (1, 1)), pool, SIZES)
    try:
        assert_same(average_pool(pool, 4), pool, SIZES)
    except ReparamError:
        return


def sequential() -> None:
    net = cast(
        nn.Sequential,
        hostile(nn.Sequential(nn.Conv2d(4, 6, (2, 3), 2, 1, groups=2), nn.Conv2d(6, 4, 3, 2, dilation=2, groups=2)), 7),
    )
    assert_same(compose(from_layer(net[0]), from_layer(net[1])), net, SIZES)


def dense_in_groups() -> None:
    net = cast(nn.Sequential, hostile(nn.Sequential(nn.Conv2d(8, 12, 1, groups=4), nn.Conv2d(12, 6, 3, groups=6)), 8))
    assert_same(compose(from_layer(net[0]), from_layer(net[1])), net, SIZES)


def border() -> None:
    """A 1x1 with a shift before a padded kernel: refused, or caught by its border."""
    net = cast(nn.Sequential, hostile(nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3, padding=1)), 9))
    try:
        assert_same(compose(from_layer(net[0]), from_layer(net[1])), net, SIZES)
    except ReparamError:
        return


def side_by_side() -> None:
    one, two = hostile(nn.Conv2d(4, 4, 3, padding=1, groups=2), 10), hostile(nn.Conv2d(4, 2, 1), 11)
    assert_same(concatenate(from_layer(one), from_layer(two)), lambda x: torch.cat([one(x), two(x)], 1), SIZES)


def through_the_mean() -> None:
    conv, linear = hostile(nn.Conv2d(6, 8, 1, groups=2), 12), hostile(nn.Linear(8, 3), 13)
    x = noise(3, 6, 5, 7)
    with torch.no_grad():
        wanted = linear(conv(x).mean((2, 3)))
        merged = pool_to_linear(from_layer(conv), from_layer(linear))
        found = nn.functional.linear(x.mean((2, 3)), merged.weight, merged.bias)
    assert relative_difference(found, wanted) < LIMIT


CASES: list[Case] = [
    conv_and_norm, norm_alone, parallel_block, uneven_block, grouped_identity, pooled, uneven_divisor, sequential,
    dense_in_groups, border, side_by_side, through_the_mean,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_right_merge_passes(case: Case) -> None:
    case()


FOLD, PLACE, MERGE = algebra.fold_batch_norm, parallel._place, algebra.merge_branches
GEOMETRY, LAYER_POOL, WEIGHTS = parallel.aligned_geometry, layers.pool_convolution, sequence._compose_weights


def norm_with(**changes: Any) -> Callable[..., Any]:
    """The fold, of a batch norm with something forgotten."""

    def fold(weight: Tensor, bias: Tensor | None, norm: Any) -> Any:
        twin = type(norm)(norm.num_features, norm.eps, dtype=torch.float64).eval()
        twin.load_state_dict(norm.state_dict())
        with torch.no_grad():
            for name, change in changes.items():
                if name == "eps":
                    twin.eps = change
                else:
                    getattr(twin, name).copy_(change(getattr(twin, name)))
        return FOLD(weight, bias, twin)

    return fold


def place_with(pick: Callable[..., Any]) -> Callable[..., Tensor]:
    def place(conv: Convolution, kernel: Any, dilation: Any, padding: Any) -> Tensor:
        return PLACE(*pick(conv, kernel, dilation, padding))

    return place


def off_centre(conv: Convolution, kernel: Any, dilation: Any, padding: Any) -> Any:
    """A 1x1 kernel in the corner of the larger one."""
    corner = tuple(before for before, _ in conv.padding)
    return (
        conv,
        kernel,
        dilation,
        tuple((b, a) for b, (_, a) in zip(corner, padding, strict=True)) if set(conv.kernel) == {1} else padding,
    )


def geometry_with(**changes: Callable[..., Any]) -> Callable[..., Any]:
    def geometry(convs: Any) -> Any:
        found = dict(zip(("kernel", "dilation", "padding", "mode"), GEOMETRY(convs), strict=True))
        return tuple(changes[name](value) if name in changes else value for name, value in found.items())

    return geometry


def identity_without_groups(conv: Convolution, groups: int) -> Convolution:
    """Each output of a grouped kernel reads the first inputs: i instead of i mod I/g."""
    wide = conv.weight.new_zeros(conv.out_channels, conv.in_channels // groups, *conv.kernel)
    wide[:, : conv.weight.shape[1]] = conv.weight
    return replace(conv, weight=wide, groups=groups)


def unshifted(first: Convolution, second: Convolution) -> Any:
    weight, dilation = WEIGHTS(first, second)
    return weight.flip(-1), dilation


def without_taps(first: Convolution, second: Convolution) -> Any:
    return WEIGHTS(first, replace(second, dilation=(1,) * len(second.kernel)))


MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "epsilon of another batch norm": (algebra, "fold_batch_norm", norm_with(eps=1e-5)),
    "sign of gamma lost": (algebra, "fold_batch_norm", norm_with(weight=torch.abs)),
    "gamma forgotten": (algebra, "fold_batch_norm", norm_with(weight=torch.ones_like)),
    "mean not subtracted": (algebra, "fold_batch_norm", norm_with(running_mean=torch.zeros_like)),
    "beta forgotten": (algebra, "fold_batch_norm", norm_with(bias=torch.zeros_like)),
    "variance taken for deviation": (algebra, "fold_batch_norm", norm_with(running_var=torch.square)),
    "bias of the convolution dropped": (algebra, "fold_batch_norm", lambda w, b, n: FOLD(w, None, n)),
    "bias of the convolution not scaled": (
        algebra, "fold_batch_norm", lambda w, b, n: (FOLD(w, None, n)[0], FOLD(w, None, n)[1] + b),
    ),
    "fold in float32": (
        algebra, "fold_batch_norm", lambda w, b, n: tuple(t.float().double() for t in FOLD(w, b, n)),
    ),
    "coefficients forgotten": (algebra, "merge_branches", lambda b, c: MERGE(b, [1.0] * len(b))),
    "mean instead of sum": (algebra, "merge_branches", lambda b, c: MERGE(b, [x / len(b) for x in c])),
    "a branch lost": (algebra, "merge_branches", lambda b, c: MERGE(b, [*c[:-1], 0.0])),
    "biases not summed": (algebra, "merge_branches", lambda b, c: (MERGE(b, c)[0], b[0][1])),
    "1x1 in the corner": (parallel, "_place", place_with(off_centre)),
    "dilation of a branch dropped": (
        parallel, "_place", place_with(lambda c, k, d, p: (replace(c, dilation=(1,) * len(k)), k, d, p)),
    ),
    "padding dropped": (
        parallel, "aligned_geometry", geometry_with(padding=lambda p: tuple((0, 0) for _ in p)),
    ),
    "padding mirrored": (
        parallel, "aligned_geometry", geometry_with(padding=lambda p: tuple((a, b) for b, a in p)),
    ),
    "dilation dropped": (parallel, "aligned_geometry", geometry_with(dilation=lambda d: tuple(2 * x for x in d))),
    "identity with the wrong group stride": (parallel, "expand_groups", identity_without_groups),
    "groups of a sequence ignored": (sequence, "expand_groups", identity_without_groups),
    "border of zeros taken for the shift": (sequence, "_require_border", lambda *_: None),
    "count_include_pad ignored": (
        layers, "pool_convolution",
        lambda *a, **k: LAYER_POOL(*a, **{**k, "count_include_pad": True}),
    ),
    "divisor of another kernel": (
        layers, "pool_convolution", lambda *a, **k: LAYER_POOL(*a, **{**k, "divisor_override": 9}),
    ),
    "taps of a sequence in the wrong order": (sequence, "_compose_weights", unshifted),
    "dilation of the second layer dropped": (sequence, "_compose_weights", without_taps),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_merge_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, attribute, wrong = MUTATIONS[name]
    monkeypatch.setattr(module, attribute, wrong)
    caught = 0
    for case in CASES:
        try:
            case()
        except (AssertionError, RuntimeError):
            caught += 1
    assert caught


def swapped(conv: Convolution) -> Convolution:
    return replace(conv, weight=conv.weight.transpose(-1, -2).contiguous())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda conv: replace(conv, stride=(1, 1)),
        lambda conv: replace(conv, dilation=(1, 1), padding=((0, 0), (1, 1))),
        lambda conv: replace(conv, padding=((1, 1), (1, 3))),
        lambda conv: replace(conv, padding=((2, 0), (3, 1))),
        lambda conv: replace(conv, padding_mode="replicate"),
        lambda conv: replace(conv, weight=conv.weight.flip(0)),
        lambda conv: replace(conv, bias=torch.zeros_like(conv.bias)),
        lambda conv: replace(conv, weight=conv.weight.flip(-2)),
        swapped,
        lambda conv: replace(conv, weight=conv.weight * (1 + 1e-11)),
    ],
)
def test_one_wrong_property_of_a_layer_is_caught(wrong: Callable[[Convolution], Convolution]) -> None:
    layer = hostile(nn.Conv2d(4, 6, 3, 2, (1, 2), (2, 1), groups=2, padding_mode="reflect"), 14)
    right = from_layer(layer)
    assert_same(right, layer, SIZES)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_same(wrong(right), layer, SIZES)
