import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.errors import CertificateError, ReparamError
from kdexport.reparam import algebra, compose, fold_student
from kdexport.reparam.blocks import attach_branches
from kdexport.reparam.convolution import Convolution
from kdexport.reparam.fold_student import fuse_student
from kdexport.reparam.spec import BranchSpec, Placement
from kdexport.students import STUDENTS
from tests.kdexport.hostile_values import noise, randomize
from tests.kdexport.reparam.foldable_networks import Net, Residual, adapted, branched, hostile, pair, student
from tests.kdexport.reparam.plain_network import LIMIT, assert_equal_outputs, assert_plain

PLACEMENTS: tuple[Placement, ...] = ("R1", "R2")
FORMS: list[tuple[Placement | None, int]] = [(None, 1)]
FORMS += [(placement, count) for placement in PLACEMENTS for count in (1, 16)]


@pytest.mark.parametrize(("placement", "count"), FORMS)
def test_a_small_student_fuses_exactly_into_the_plain_network(placement: Placement | None, count: int) -> None:
    net, x = student(32, placement=placement, num_branches=count), noise(3, 3, 32, 32)
    result = fuse_student(net)
    assert_plain(result.module, student(32), x)
    assert_equal_outputs(result.module, net, x)


@pytest.mark.parametrize(("placement", "count"), FORMS)
def test_an_imagenet_student_fuses_exactly_into_the_plain_network(placement: Placement | None, count: int) -> None:
    net, x = student(224, placement=placement, num_branches=count), noise(2, 3, 65, 43)
    result = fuse_student(net, input_shape=(2, 3, 35, 33))
    assert_plain(result.module, student(224), x)
    assert_equal_outputs(result.module, net, x)


def test_an_imagenet_student_is_certified_at_its_own_size() -> None:
    result = fuse_student(student(224, placement="R2", num_branches=3))
    assert result.certificate.input_shape == (2, 3, 224, 224)
    assert result.certificate.whole_relative_error <= LIMIT


@pytest.mark.parametrize("size", [17, 32, 51])
def test_a_fused_student_is_exact_at_sizes_it_was_not_certified_at(size: int) -> None:
    net = student(placement="R1", num_branches=3)
    assert_equal_outputs(fuse_student(net).module, net, noise(2, 3, size, size + 6))


@pytest.mark.parametrize("placement", ["R1", "R2", None])
def test_fuse_leaves_the_original_untouched(placement: Placement | None) -> None:
    net = student(placement=placement, num_branches=3, dtype=torch.float32)
    state, modules = copy.deepcopy(net.state_dict()), [(name, id(m)) for name, m in net.named_modules()]
    parameters = [(name, id(p), p.requires_grad) for name, p in net.named_parameters()]
    fused = fuse_student(net).module
    with torch.no_grad():
        for tensor in fused.state_dict().values():
            tensor.zero_()
    after = net.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in state.items())
    assert [(name, id(m)) for name, m in net.named_modules()] == modules
    assert [(name, id(p), p.requires_grad) for name, p in net.named_parameters()] == parameters
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not net.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fused_student_keeps_the_type_of_the_student(dtype: torch.dtype) -> None:
    fused = fuse_student(student(placement="R1", num_branches=2, dtype=dtype)).module
    assert {tensor.dtype for tensor in fused.state_dict().values()} == {dtype}
    assert not fused.training


@pytest.mark.parametrize("placement", ["R1", "R2"])
def test_float32_weights_are_the_float64_fold_rounded_once(placement: Placement) -> None:
    net = student(placement=placement, num_branches=4, dtype=torch.float32)
    narrow, wide = fuse_student(net).module, fuse_student(copy.deepcopy(net).double()).module
    rounded = {name: tensor.float() for name, tensor in wide.state_dict().items()}
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in narrow.state_dict().items())


def test_weights_lie_in_memory_as_those_of_a_fresh_layer_do() -> None:
    net = STUDENTS.build("mobilenetv2", num_classes=7, image_size=32)
    attach_branches(net, BranchSpec(placement="R2", num_branches=2, adapter_channels=9, layers=("stage1", "last")))
    for name, tensor in fuse_student(net.eval()).module.state_dict().items():
        assert tensor.stride() == torch.empty(tensor.shape).stride(), name


def test_weights_that_overflow_the_type_of_the_student_are_refused() -> None:
    net = pair().eval()
    batch_norm = net.get_submodule("bn")
    assert isinstance(batch_norm, nn.BatchNorm2d)
    randomize(net)
    batch_norm.eps = 1e-12
    batch_norm.running_var = torch.full((5,), 1e-7)
    batch_norm.weight.data.fill_(300)
    net.get_parameter("conv.weight").data.fill_(2)
    with pytest.raises(ReparamError, match=r"The folded conv\.weight exceeds the range of torch\.float16"):
        fuse_student(net.half())


def test_the_certificate_tells_each_block_the_whole_and_the_parameters() -> None:
    net = student(placement="R1", num_branches=4)
    certificate = fuse_student(net).certificate
    convs = [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and "branches" not in name]
    assert [block.name for block in certificate.blocks] == [*convs, "conv2.0"]
    assert [block.kind for block in certificate.blocks] == ["conv + batch norm"] * 52 + ["parallel branches"]
    assert certificate.holds
    assert 0 < certificate.whole_relative_error <= LIMIT
    assert all(block.relative_error <= LIMIT for block in certificate.blocks)
    assert certificate.worst in certificate.blocks
    assert certificate.input_shape == (2, 3, 32, 32)
    assert certificate.unfused_parameters == sum(p.numel() for p in net.parameters())
    # Three more branches of 160 x 1280 weights and two batch norm vectors; one bias replaces each gain and shift.
    biases = sum(m.num_features for m in student().modules() if isinstance(m, nn.BatchNorm2d))
    assert certificate.unfused_parameters - certificate.fused_parameters == 3 * (160 * 1280 + 2 * 1280) + biases
    assert json.loads(json.dumps(certificate.to_json()))["blocks"][0]["name"] == "conv1.0"


def test_the_certificate_of_adapters_names_the_adapters() -> None:
    certificate = fuse_student(student(placement="R2", num_branches=2)).certificate
    assert (certificate.blocks[-1].name, certificate.blocks[-1].kind) == ("adapters.last", "adapters into classifier")
    assert certificate.blocks[-1].relative_error <= LIMIT


def test_a_residual_network_with_groups_dilation_and_linear_batch_norm_fuses_exactly() -> None:
    net = hostile(Residual())
    result = fuse_student(net)
    assert [block.name for block in result.certificate.blocks] == ["stem.0", "conv1", "conv2", "shortcut.0", "hidden"]
    assert not any(isinstance(m, _BatchNorm) for m in result.module.modules())
    assert_equal_outputs(result.module, net, noise(3, 3, 21, 19))


def test_a_perceptron_with_batch_norm_fuses_exactly() -> None:
    net = hostile(
        nn.Sequential(
            nn.Linear(9, 7), nn.BatchNorm1d(7), nn.ReLU(inplace=True), nn.Linear(7, 5, bias=False), nn.BatchNorm1d(5)
        )
    )
    result = fuse_student(net)
    assert [type(m).__name__ for m in result.module.children()] == ["Linear", "Identity", "ReLU", "Linear", "Identity"]
    assert_equal_outputs(result.module, net, noise(4, 9))


@pytest.mark.parametrize("dimensions", [1, 3])
def test_one_and_three_dimensional_networks_fuse_exactly_when_given_an_input_shape(dimensions: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](4, 6, 3, padding=1, groups=2)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1](6)
    net, shape = hostile(pair(conv, norm)), (2, 4, *(7, 5, 6)[:dimensions])
    with pytest.raises(ReparamError, match="input of Net is not known"):
        fuse_student(net)
    assert_equal_outputs(fuse_student(net, input_shape=shape).module, net, noise(*shape))


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_merged_branches_keep_stride_dilation_groups_and_padding_mode(
    padding_mode: Literal["reflect", "replicate", "circular"],
) -> None:
    def branch(bias: bool) -> nn.Module:
        conv = nn.Conv2d(5, 10, (3, 2), 2, (2, 1), (2, 1), 5, bias=bias, padding_mode=padding_mode)
        return nn.Sequential(conv, nn.BatchNorm2d(10, eps=1e-3))

    net = hostile(branched([branch(True), branch(False), branch(True)]))
    assert_equal_outputs(fuse_student(net).module, net, noise(2, 3, 15, 13))


def test_branches_without_batch_norm_and_bare_branches_merge_exactly() -> None:
    sequence = nn.Sequential(nn.Conv2d(5, 4, 3))
    normed = nn.Sequential(nn.Conv2d(5, 4, 3, bias=False), nn.SyncBatchNorm(4))
    net = hostile(branched([nn.Conv2d(5, 4, 3), sequence, normed]))
    assert_equal_outputs(fuse_student(net).module, net, noise(2, 3, 9, 11))


def test_dropout_and_module_pooling_between_adapters_and_classifier_fold_exactly() -> None:
    net = hostile(
        adapted(
            head=lambda m, x: m.classifier(m.drop(m.flat(m.pool(x)))),
            pool=nn.AdaptiveAvgPool2d((1, 1)),
            flat=nn.Flatten(),
            drop=nn.Dropout(0.5),
        )
    )
    result = fuse_student(net)
    assert result.module.get_parameter("classifier.weight").shape == (4, 5)
    assert_equal_outputs(result.module, net, noise(2, 3, 9, 11))


@pytest.mark.parametrize("alias_first", [True, False])
def test_a_batch_norm_registered_under_two_names_is_removed_under_both(alias_first: bool) -> None:
    conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
    parts: dict[str, nn.Module] = {"conv": conv, "bn": norm}
    alias = {"alias": nn.Sequential(conv, norm)}
    net = hostile(Net(lambda m, x: m.bn(m.conv(x)), **(alias | parts if alias_first else parts | alias)))
    fused = fuse_student(net).module
    assert not any(isinstance(m, _BatchNorm) for m in fused.modules())
    assert_equal_outputs(fused, net, noise(2, 3, 9, 11))


def test_a_module_without_anything_to_fold_is_copied_and_certified() -> None:
    net = hostile(nn.Sequential(nn.Linear(6, 5), nn.ReLU()))
    result = fuse_student(net)
    assert result.certificate.blocks == ()
    assert result.module is not net
    assert_equal_outputs(result.module, net, noise(4, 6))


def test_an_input_shape_that_the_module_cannot_read_is_named() -> None:
    with pytest.raises(ReparamError, match=r"does not accept an input of shape \(2, 4, 8, 8\)"):
        fuse_student(hostile(pair()), input_shape=(2, 4, 8, 8))


# Below, the algebra is broken on purpose: the certificate must notice, and name the block.

Fold = Callable[[Tensor, Tensor | None, Any], tuple[Tensor, Tensor]]
TRUE_FOLD: Fold = algebra.fold_batch_norm


def wrong_eps(weight: Tensor, bias: Tensor | None, batch_norm: Any) -> tuple[Tensor, Tensor]:
    other = copy.deepcopy(batch_norm)
    other.eps = batch_norm.eps * 1.01
    return TRUE_FOLD(weight, bias, other)


def dropped_bias(weight: Tensor, bias: Tensor | None, batch_norm: Any) -> tuple[Tensor, Tensor]:
    folded = TRUE_FOLD(weight, bias, batch_norm)
    return folded[0], torch.zeros_like(folded[1])


def swapped_channels(weight: Tensor, bias: Tensor | None, batch_norm: Any) -> tuple[Tensor, Tensor]:
    other = copy.deepcopy(batch_norm)
    for name in ("running_mean", "running_var"):
        setattr(other, name, getattr(batch_norm, name).roll(1))
    return TRUE_FOLD(weight, bias, other)


def rounded_to_float32(weight: Tensor, bias: Tensor | None, batch_norm: Any) -> tuple[Tensor, Tensor]:
    folded = TRUE_FOLD(weight, bias, batch_norm)
    return folded[0].float().double(), folded[1]


def one_nan(weight: Tensor, bias: Tensor | None, batch_norm: Any) -> tuple[Tensor, Tensor]:
    folded = TRUE_FOLD(weight, bias, batch_norm)
    folded[0].view(-1)[-1] = float("nan")
    return folded


def one_infinity(weight: Tensor, bias: Tensor | None, batch_norm: Any) -> tuple[Tensor, Tensor]:
    folded = TRUE_FOLD(weight, bias, batch_norm)
    folded[1][0] = float("inf")
    return folded


MUTANTS = [wrong_eps, dropped_bias, swapped_channels, rounded_to_float32, one_nan, one_infinity]


def at_call(mutant: Fold, index: int) -> Fold:
    """The true fold, but for the ``index``-th call."""
    calls: Iterator[int] = iter(range(1000))
    return lambda weight, bias, norm: (mutant if next(calls) == index else TRUE_FOLD)(weight, bias, norm)


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize(("index", "name"), [(0, "conv1.0"), (23, "blocks.3.1.conv.3"), (51, "blocks.6.0.conv.6")])
def test_a_wrong_fold_is_caught_and_its_block_named(
    mutant: Fold, index: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = student()
    monkeypatch.setattr(fold_student, "fold_batch_norm", at_call(mutant, index))
    with pytest.raises(CertificateError, match=rf"worst block {re.escape(name)} \(conv \+ batch norm\)"):
        fuse_student(net)


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize(
    ("placement", "block"), [("R1", "conv2.0 (parallel branches)"), ("R2", "adapters.last (adapters")]
)
def test_a_wrong_fold_inside_a_branch_is_caught_and_its_block_named(
    mutant: Fold, placement: Placement, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = student(placement=placement, num_branches=3)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    monkeypatch.setattr(fold_student, "fold_batch_norm", at_call(mutant, norms - 2))
    with pytest.raises(CertificateError, match=re.escape(f"worst block {block}")):
        fuse_student(net)


@pytest.mark.parametrize("placement", ["R1", "R2"])
@pytest.mark.parametrize("coefficients", [[1.0] * 4, [0.25, 0.25, 0.25, 0.25 + 1e-8], [0.25] * 3 + [0.0]])
def test_wrong_branch_coefficients_are_caught(
    placement: Placement, coefficients: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = student(placement=placement, num_branches=4)
    monkeypatch.setattr(fold_student, "merge_branches", lambda branches: algebra.merge_branches(branches, coefficients))
    with pytest.raises(CertificateError, match=f"worst block {'conv2.0' if placement == 'R1' else 'adapters.last'} "):
        fuse_student(net)


def test_a_dropped_adapter_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    net = student(placement="R2", num_branches=2)

    def without_bias(conv: Convolution, linear: Convolution) -> Convolution:
        return compose.pool_to_linear(replace(conv, bias=torch.zeros_like(conv.bias)), linear)

    monkeypatch.setattr(fold_student, "pool_to_linear", without_bias)
    with pytest.raises(CertificateError, match=r"worst block adapters\.last"):
        fuse_student(net)


def test_a_lost_padding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = fold_student._merged

    def zero_padded(module: nn.Module, path: str) -> nn.Conv2d:
        conv = merged(module, path)
        conv.padding_mode = "zeros"
        return conv

    net = hostile(branched([nn.Conv2d(5, 4, 3, padding=1, padding_mode="replicate") for _ in range(2)]))
    monkeypatch.setattr(fold_student, "_merged", zero_padded)
    with pytest.raises(CertificateError, match="worst block parallel"):
        fuse_student(net)


def test_a_wrong_fold_behind_dead_activations_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)
    )
    hostile(net)
    # The first batch norm switches every channel off, so that the second convolution reads zeros.
    net.get_parameter("1.bias").data.fill_(-1e6)
    mutant = at_call(lambda w, b, norm: (TRUE_FOLD(w, b, norm)[0] * 3, TRUE_FOLD(w, b, norm)[1]), 1)
    monkeypatch.setattr(fold_student, "fold_batch_norm", mutant)
    with pytest.raises(CertificateError, match=r"worst block 3 \(conv \+ batch norm\)"):
        fuse_student(net)


@pytest.mark.parametrize("tensor", ["conv1.0.weight", "conv1.1.running_var", "conv1.1.bias", "classifier.0.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_student_with_a_value_that_is_not_finite_never_passes(tensor: str, value: float) -> None:
    net = student()
    net.state_dict()[tensor].view(-1)[-1] = value
    # An infinite variance silences its channel, which is finite, and the fold agrees.
    if (tensor, value) == ("conv1.1.running_var", float("inf")):
        assert fuse_student(net).certificate.holds
    else:
        with pytest.raises(CertificateError, match="differs from the original by nan"):
            fuse_student(net)
