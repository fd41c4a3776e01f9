"""Adapters inside a network: which reader takes them in exactly, and which is refused with its reason."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.errors import CertificateError, ReparamError
from kdexport.reparam import fold_student
from kdexport.reparam.branches import Adapters
from kdexport.reparam.compose import compose
from kdexport.reparam.convolution import Convolution, from_layer
from kdexport.reparam.fold_student import fuse_student
from kdexport.reparam.structure import ComposeAdapters, find_steps
from tests.kdexport.hostile_values import noise, relative_difference
from tests.kdexport.reparam.foldable_networks import Net, hostile

SHAPE = (2, 3, 11, 14)


def two_adapters() -> Adapters:
    return Adapters([nn.Sequential(nn.Conv2d(5, 6, 1, bias=i == 1), nn.BatchNorm2d(6, eps=10.0**-i)) for i in (1, 4)])


def read_by(
    reader: nn.Module, run: Callable[[Net, Tensor], Tensor] = lambda m, x: m.reader(x), **parts: nn.Module
) -> Net:
    """A stem of five channels, adapters to six, and what reads them, in evaluation mode with hostile batch norms."""
    net = Net(
        lambda m, x: run(m, m.adapter(functional.relu(m.stem(x)))),
        stem=nn.Conv2d(3, 5, 3),
        adapter=two_adapters(),
        reader=reader,
        **parts,
    )
    hostile(net)
    return net


READERS = {
    "pointwise": lambda: nn.Conv2d(6, 8, 1, bias=False),
    "pointwise with bias and stride": lambda: nn.Conv2d(6, 8, 1, stride=2),
    "spatial without padding": lambda: nn.Conv2d(6, 8, 3),
    "odd kernel, stride and dilation": lambda: nn.Conv2d(6, 8, (2, 3), stride=(2, 1), dilation=(1, 2), bias=False),
    "named valid": lambda: nn.Conv2d(6, 8, (1, 4), padding="valid"),
    "reflected border": lambda: nn.Conv2d(6, 8, 3, padding=(1, 2), padding_mode="reflect"),
    "replicated border": lambda: nn.Conv2d(6, 8, 5, padding=2, padding_mode="replicate", bias=False),
    "circular border": lambda: nn.Conv2d(6, 8, 3, padding="same", padding_mode="circular"),
    "pointwise named same": lambda: nn.Conv2d(6, 8, 1, padding="same"),
}


@pytest.mark.parametrize("norm", [False, True], ids=["", "batch norm"])
@pytest.mark.parametrize("kind", READERS)
def test_a_convolution_that_reads_no_padded_zero_takes_adapters_in_exactly(kind: str, norm: bool) -> None:
    parts: dict[str, nn.Module] = {"bn": nn.BatchNorm2d(8, eps=1e-2)} if norm else {}
    net = read_by(READERS[kind](), lambda m, x: m.bn(m.reader(x)) if norm else m.reader(x), **parts)
    assert find_steps(net) == [ComposeAdapters("adapter", "reader", "bn" if norm else None, False)]
    result = fuse_student(net)
    fused = result.module.get_submodule("reader")
    assert isinstance(fused, nn.Conv2d)
    assert fused.in_channels == fused.weight.shape[1] == 5
    assert [(block.name, block.kind) for block in result.certificate.blocks] == [("adapter", "adapters into conv")]
    for shape in (SHAPE, (3, 3, 17, 9)):
        x = noise(*shape)
        with torch.no_grad():
            assert relative_difference(result.module(x), net(x)) <= 1e-12


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        (nn.Conv2d(6, 8, 3, padding=1), "pads zeros"),
        (nn.Conv2d(6, 8, (1, 3), padding=(0, 1), bias=False), "pads zeros"),
        (nn.Conv2d(6, 8, 1, padding=1), "pads zeros"),
        (nn.Conv2d(6, 8, (3, 1), padding="same"), "pads zeros"),
        (nn.Conv2d(6, 8, 1, groups=2), "2 groups and the adapter has one"),
        (nn.Conv2d(6, 6, 3, groups=6), "6 groups and the adapter has one"),
    ],
)
def test_a_convolution_that_cannot_take_them_in_is_refused_with_the_reason(reader: nn.Module, reason: str) -> None:
    with pytest.raises(ReparamError, match=reason) as caught:
        fuse_student(read_by(reader), input_shape=SHAPE)
    assert "adapter" in caught.value.message
    assert "reader" in caught.value.message
    assert "R1" in caught.value.remedy


def test_padded_zeros_would_really_be_wrong_at_the_border_alone() -> None:
    """The refusal is about something: the fold that it forbids is exact inside and wrong at the edge."""
    net = read_by(nn.Conv2d(6, 8, 3, padding=1))
    adapter, reader = net.get_submodule("adapter"), net.get_submodule("reader")
    assert isinstance(reader, nn.Conv2d)
    unpadded = replace(from_layer(reader), padding=((0, 0), (0, 0)))
    folded = compose(from_layer(fold_student._merged(net, "adapter")), unpadded)
    x = noise(1, 5, 8, 9)
    with torch.no_grad():
        wrong, right = functional.conv2d(x, folded.weight, folded.bias, padding=1), reader(adapter(x))
    error = (wrong - right).abs() / right.abs().max()
    assert error[..., 1:-1, 1:-1].max() < 1e-12
    assert error[..., 0, :].max() > 1e-3


def shuffle(x: Tensor) -> Tensor:
    count, channels, height, width = x.shape
    return x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(count, channels, height, width)


@pytest.mark.parametrize(
    ("run", "between"),
    [
        (lambda m, x: m.reader(functional.relu(x)), "relu"),
        (lambda m, x: m.reader(m.act(x)), "Hardswish"),
        (lambda m, x: m.reader(m.shuffle(x)), "ChannelShuffle"),
        (lambda m, x: m.reader(functional.max_pool2d(x, 2)), "max_pool2d"),
        (lambda m, x: m.reader(x * 2), "mul"),
    ],
)
def test_what_lies_between_adapters_and_their_reader_is_named(
    run: Callable[[Net, Tensor], Tensor], between: str
) -> None:
    net = read_by(nn.Conv2d(6, 8, 1), run, act=nn.Hardswish(), shuffle=nn.ChannelShuffle(2))
    with pytest.raises(ReparamError, match=rf"Between adapter adapter and the layer that reads it is .*{between}"):
        fuse_student(net, input_shape=SHAPE)


def test_a_shuffle_spelt_out_is_refused_for_its_many_readers_or_by_name() -> None:
    net = read_by(nn.Conv2d(6, 8, 1), lambda m, x: m.reader(shuffle(x)))
    with pytest.raises(ReparamError, match=r"2 users|moves channels"):
        fuse_student(net, input_shape=SHAPE)
    net = read_by(nn.Conv2d(6, 8, 1), lambda m, x: m.reader(x.transpose(2, 3)))
    with pytest.raises(ReparamError, match="transpose, which moves channels or positions"):
        fuse_student(net, input_shape=SHAPE)


@pytest.mark.parametrize(
    "run", [lambda m, x: x + m.reader(x), lambda m, x: m.reader(x) + m.other(x)], ids=["residual", "two convolutions"]
)
def test_adapters_with_two_readers_are_refused_and_both_are_named(run: Callable[[Net, Tensor], Tensor]) -> None:
    net = read_by(nn.Conv2d(6, 6, 1), run, other=nn.Conv2d(6, 6, 1))
    with pytest.raises(ReparamError, match=r"2 users \(.*reader.*\)|2 users \(.*other.*\)"):
        fuse_student(net, input_shape=SHAPE)


def test_a_reader_that_is_called_twice_is_refused() -> None:
    net = read_by(nn.Conv2d(6, 6, 1), lambda m, x: m.reader(functional.relu(m.reader(x))))
    with pytest.raises(ReparamError, match="reader is called at 2 places"):
        fuse_student(net, input_shape=SHAPE)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(5, 6, 1, stride=2)], ids=["spatial", "strided"]
)
def test_spatial_and_strided_adapters_before_a_convolution_are_refused(conv: nn.Module) -> None:
    net = read_by(nn.Conv2d(6, 8, 1))
    net.adapter = Adapters([conv, conv])
    with pytest.raises(ReparamError, match=re.escape("not plain 1x1 convolutions")):
        fuse_student(hostile(net), input_shape=SHAPE)


@pytest.mark.parametrize("mutant", ["first bias dropped", "transposed", "second bias dropped"])
def test_a_wrong_composition_is_caught_and_its_adapters_named(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(first: Convolution, second: Convolution) -> Convolution:
        if mutant == "first bias dropped":
            return compose(replace(first, bias=torch.zeros_like(first.bias)), second)
        if mutant == "second bias dropped":
            return compose(first, replace(second, bias=torch.zeros_like(second.bias)))
        return compose(first, replace(second, weight=second.weight.flip(1)))

    monkeypatch.setattr(fold_student, "compose", wrong)
    with pytest.raises(CertificateError, match=r"worst block adapter \(adapters into conv\)"):
        fuse_student(read_by(nn.Conv2d(6, 8, 3)), input_shape=SHAPE)
