"""A network is compared with its exported program before anything is merged: by batch, by randomness, by its hooks."""

import copy
import random
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from kdexport.errors import ReparamError
from kdexport.reparam.program import fuse_module
from tests.kdexport.hostile_values import noise, relative_difference
from tests.kdexport.reparam.foreign_blocks import Forward, conv_bn, ready

SHAPE = (1, 3, 9, 8)


def fuse(run: Callable[[Any, Tensor], Any], **parts: nn.Module) -> Any:
    parts = {"a": conv_bn(3, 4, 3), **parts}
    return fuse_module(ready(Forward(run, **parts)), (noise(*SHAPE),))


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (2, 2), (3, 3)])
def test_a_network_that_takes_another_path_at_one_batch_is_refused_with_the_batch(batch: int, size: int) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        logits = m.a(x).mean((2, 3))
        # A Python number of the size hides the choice from torch.export.
        return cast(Tensor, logits.softmax(1) if x.shape[0] == size else logits)

    with pytest.raises(ReparamError) as caught:
        fuse(run)
    assert f"batch {batch}" in caught.value.message or "cannot be exported" in caught.value.message


def test_the_difference_at_batch_one_is_told_in_numbers() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        logits = m.a(x).mean((2, 3))
        return cast(Tensor, logits + 1e-6 if x.shape[0] == 1 else logits)

    with pytest.raises(
        ReparamError, match=r"differ at batch 1 in output 0 by \d\.\de-0\d of its largest value \(up to"
    ):
        fuse(run)


def test_a_network_that_fails_at_one_batch_is_refused_with_its_own_words() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return cast(Tensor, m.a(x).mean((2, 3)).squeeze().flatten(1))

    with pytest.raises(ReparamError, match=r"inputs \(1, 3, 9, 8\), a batch of 1: IndexError: Dimension out of range"):
        fuse(run)


def test_an_output_that_is_missing_at_one_batch_is_no_rounding() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return (y, y * 2) if x.shape[0] > 1 else (y,)

    with pytest.raises(ReparamError, match="batch 1 in the number, shape or type of its outputs"):
        fuse(run)


@pytest.mark.parametrize(
    ("run", "generator"),
    [
        (lambda m, x: m.a(x) * (0.0 if random.random() < 1e-9 else 1.0), "Python's random"),
        (lambda m, x: m.a(x) * (0.0 if np.random.rand() < 1e-9 else 1.0), "Python's numpy.random"),
    ],
)
def test_a_choice_by_a_generator_of_python_is_refused_however_rare_it_is(run: Any, generator: str) -> None:
    with pytest.raises(ReparamError, match=f"draws numbers from {generator}"):
        fuse(run)


def masked(m: Any, x: Tensor) -> Tensor:
    forbidden = torch.tensor([False, True, False, False])
    return cast(Tensor, m.a(x).mean((2, 3)).masked_fill(forbidden, -torch.inf))


def test_logits_that_are_masked_by_minus_infinity_are_equal_to_themselves() -> None:
    fused = fuse(masked)
    assert fused.certificate.whole_relative_error < 1e-12
    assert fused.module(noise(3, 3, 9, 8))[:, 1].tolist() == [-torch.inf] * 3


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "holds NaN: 1 of 108"), (float("inf"), "holds infinite values: 1 of 108")]
)
def test_a_weight_that_is_no_number_is_named(value: float, words: str) -> None:
    net = ready(Forward(lambda m, x: m.a(x), a=conv_bn(3, 4, 3)))
    with torch.no_grad():
        cast(Any, net).a[0].weight[1, 2, 0, 1] = value
    with pytest.raises(ReparamError, match=rf"The weight a\.0\.weight {words}"):
        fuse_module(net, (noise(*SHAPE),))


def test_an_output_that_is_nan_without_any_merge_is_no_algebra_error() -> None:
    with pytest.raises(ReparamError, match="holds NaN on noise before anything is merged"):
        fuse(lambda m, x: (m.a(x) * 0 - 1).sqrt())


def pruned() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3)
    prune.l1_unstructured(conv, "weight", 0.4)  # type: ignore[no-untyped-call]
    return conv


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "weight norm by a hook": lambda: weight_norm(nn.Conv2d(3, 4, 3)),
    "weight norm by a parametrization": lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
    "spectral norm by a hook": lambda: spectral_norm(nn.Conv2d(3, 4, 3)),
    "spectral norm by a parametrization": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
    "pruned": pruned,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_from_others_is_merged_and_the_original_is_untouched(name: str) -> None:
    net = nn.Sequential(COMPUTED[name](), nn.BatchNorm2d(4, eps=1e-2), nn.ReLU()).double().eval()
    ready(nn.Sequential(net[1]))
    before, hooks = {k: v.clone() for k, v in net.state_dict().items()}, len(net[0]._forward_pre_hooks)
    fused = fuse_module(net, (noise(*SHAPE),))
    assert fused.after.operators == {"conv2d": 1, "relu": 1}
    assert sorted(name for name, _ in fused.module.named_parameters()) == ["0.bias", "0.weight"]
    x = noise(4, 3, 9, 8, seed=3)
    with torch.no_grad():
        assert relative_difference(fused.module(x), net(x)) < 1e-12
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert len(net[0]._forward_pre_hooks) == hooks


def test_a_hook_of_the_user_is_refused_with_the_call_that_removes_it() -> None:
    net = ready(nn.Sequential(conv_bn(3, 4, 3)))
    cast(Any, net)[0][0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    with pytest.raises(ReparamError, match=r"0\.0 has a forward hook") as caught:
        fuse_module(net, (noise(*SHAPE),))
    assert caught.value.remedy == "Remove it first: call remove() on what register_forward_hook returned."


@pytest.mark.filterwarnings("ignore:.*TorchScript.*:DeprecationWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_module_is_refused_in_one_sentence() -> None:
    net = torch.jit.script(conv_bn(3, 4, 3).eval())
    with pytest.raises(ReparamError, match="A TorchScript module cannot be exported") as caught:
        fuse_module(net, (torch.randn(*SHAPE),))
    assert caught.value.remedy == "Pass the Python module that it was scripted or traced from."


def test_a_narrow_type_is_compared_in_that_type() -> None:
    net = copy.deepcopy(ready(nn.Sequential(conv_bn(3, 4, 3), nn.ReLU()))).bfloat16()
    fused = fuse_module(net, (noise(*SHAPE).bfloat16(),))
    assert fused.after.operators == {"conv2d": 1, "relu": 1}
    assert {value.dtype for value in fused.module.parameters()} == {torch.bfloat16}


def test_integer_inputs_keep_their_values_at_every_batch() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 6), nn.Linear(6, 3)

        def forward(self, index: Tensor) -> Tensor:
            return functional.relu(self.head(self.table(index)))

    assert fuse_module(ready(Lookup()), (torch.tensor([4]),)).after.operators["linear"] == 1
