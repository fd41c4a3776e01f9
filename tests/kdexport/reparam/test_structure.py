import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from kdexport.errors import ReparamError
from kdexport.reparam.branches import ParallelBranches
from kdexport.reparam.fold_student import fuse_student
from kdexport.reparam.structure import ComposeAdapters, FoldPair, MergeBranches, branch_layers, find_steps
from tests.kdexport.hostile_values import noise, randomize, relative_difference
from tests.kdexport.reparam.foldable_networks import Net, adapted, branched, hostile, pair, pool_to_one, student


def assert_refused(net: nn.Module, *facts: str, shape: tuple[int, ...] = (2, 3, 9, 11)) -> None:
    """``fuse_student`` refuses ``net``; the message holds every fact, and the error says what to do."""
    with pytest.raises(ReparamError) as caught:
        fuse_student(net, input_shape=shape)
    for fact in facts:
        assert re.search(rf"(?<![\w.]){re.escape(fact)}(?!\w)", caught.value.message), caught.value.message
    assert caught.value.remedy


def test_steps_come_in_the_order_of_the_dataflow_not_of_registration() -> None:
    net = Net(
        lambda m, x: m.late_bn(m.late(m.early_bn(m.early(x)))),
        late=nn.Conv2d(4, 5, 1),
        early_bn=nn.BatchNorm2d(4),
        late_bn=nn.BatchNorm2d(5),
        early=nn.Conv2d(3, 4, 1),
    )
    assert find_steps(net.eval()) == [FoldPair("early", "early_bn"), FoldPair("late", "late_bn")]


def test_branches_and_adapters_of_a_student_are_found() -> None:
    assert find_steps(student(placement="R1", num_branches=2))[-1] == MergeBranches("conv2.0")
    assert find_steps(student(placement="R2", num_branches=2))[-1] == ComposeAdapters(
        "adapters.last", "classifier.0", None, True
    )
    assert find_steps(student(224, placement="R2", num_branches=2))[-1] == ComposeAdapters(
        "adapters.last", "classifier.1", None, True
    )


def test_a_functional_activation_between_batch_norms_does_not_disturb_the_search() -> None:
    net = Net(
        lambda m, x: m.bn(m.conv(functional.relu(m.first_bn(m.first(x)) * 2))),
        first=nn.Conv2d(3, 4, 1),
        first_bn=nn.BatchNorm2d(4),
        conv=nn.Conv2d(4, 5, 1),
        bn=nn.BatchNorm2d(5),
    )
    assert len(find_steps(net.eval())) == 2


def test_a_convolution_called_at_two_places_is_refused() -> None:
    net = Net(
        lambda m, x: m.bn_b(m.conv(functional.relu(m.bn_a(m.conv(x))))),
        conv=nn.Conv2d(3, 3, 3, padding=1),
        bn_a=nn.BatchNorm2d(3),
        bn_b=nn.BatchNorm2d(3),
    )
    assert_refused(hostile(net), "conv", "2 places")


def test_a_batch_norm_called_at_two_places_is_refused() -> None:
    net = Net(
        lambda m, x: m.bn(m.conv_b(functional.relu(m.bn(m.conv_a(x))))),
        conv_a=nn.Conv2d(3, 3, 3, padding=1),
        conv_b=nn.Conv2d(3, 3, 3, padding=1),
        bn=nn.BatchNorm2d(3),
    )
    assert_refused(hostile(net), "bn", "2 places")


def test_one_batch_norm_under_two_names_counts_as_one_module() -> None:
    norm = nn.BatchNorm2d(3)
    net = Net(
        lambda m, x: m.bn_b(m.conv_b(functional.relu(m.bn_a(m.conv_a(x))))),
        conv_a=nn.Conv2d(3, 3, 3, padding=1),
        conv_b=nn.Conv2d(3, 3, 3, padding=1),
        bn_a=norm,
        bn_b=norm,
    )
    assert_refused(hostile(net), "bn_a", "2 places")


def test_branches_called_at_two_places_are_refused() -> None:
    branches = ParallelBranches([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
    assert_refused(hostile(Net(lambda m, x: m.twice(m.twice(x)), twice=branches)), "twice", "2 places")


def test_a_block_whose_container_is_called_at_two_places_is_refused() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    assert_refused(hostile(Net(lambda m, x: m.block(m.block(x)), block=block)), "block.0", "2 places")


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)),
        lambda m, x: (lambda y: torch.cat([m.bn(y), y]))(m.conv(x)),
        lambda m, x: (lambda y: m.bn(y) * y.mean((2, 3), keepdim=True))(m.conv(x)),
    ],
    ids=["sum", "function", "method"],
)
def test_a_convolution_whose_output_has_another_user_is_refused(run: Callable[[Net, Tensor], Tensor]) -> None:
    assert_refused(hostile(Net(run, conv=nn.Conv2d(3, 5, 3), bn=nn.BatchNorm2d(5))), "conv", "2 users")


def test_one_convolution_under_two_batch_norms_is_refused() -> None:
    net = Net(
        lambda m, x: (lambda y: m.bn_a(y) + m.bn_b(y))(m.conv(x)),
        conv=nn.Conv2d(3, 5, 3),
        bn_a=nn.BatchNorm2d(5),
        bn_b=nn.BatchNorm2d(5),
    )
    assert_refused(hostile(net), "conv", "2 users")


def test_a_module_in_training_mode_is_refused_by_the_name_of_its_type() -> None:
    assert_refused(student().train(), "SmallMobileNetV2", "in training mode")


@pytest.mark.parametrize("name", ["blocks.3.1.conv.4", "classifier", "blocks.2"])
def test_a_single_submodule_in_training_mode_is_refused_by_its_path(name: str) -> None:
    net = student()
    net.get_submodule(name).training = True
    assert_refused(net, name, "in training mode")


def test_a_batch_norm_without_running_statistics_is_refused_by_name() -> None:
    assert_refused(hostile(pair(batch_norm=nn.BatchNorm2d(5, track_running_stats=False))), "bn", "running statistics")


def test_a_branch_whose_batch_norm_keeps_no_running_statistics_is_refused_by_name() -> None:
    branches = [nn.Sequential(nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4, track_running_stats=i == 0)) for i in range(2)]
    assert_refused(hostile(branched(branches)), "parallel.branches.1.1", "running statistics")


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.ConvTranspose2d(3, 3, 3), "ConvTranspose2d"),
        (nn.ReLU(), "ReLU"),
        (nn.MaxPool2d(2), "MaxPool2d"),
        (nn.Identity(), "Identity"),
        (ParallelBranches([nn.Conv2d(3, 3, 1)]), "ParallelBranches"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_batch_norm_after_another_layer_than_a_convolution_is_refused(layer: nn.Module, kind: str) -> None:
    net = Net(
        lambda m, x: m.bn(m.before(m.first_bn(m.first(x)))),
        first=nn.Conv2d(3, 3, 3),
        first_bn=nn.BatchNorm2d(3),
        before=layer,
        bn=nn.BatchNorm2d(3),
    )
    assert_refused(hostile(net), "bn", "before", kind)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.bn(functional.relu(m.conv(x))),
        lambda m, x: m.bn(m.conv(x) + 1),
        lambda m, x: m.bn(m.conv(x).contiguous()),
    ],
    ids=["function", "operator", "method"],
)
def test_a_batch_norm_after_anything_but_a_module_is_refused(run: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(run, conv=nn.Conv2d(3, 5, 3), bn=nn.BatchNorm2d(5))
    assert_refused(hostile(net), "bn", "does not directly follow")


def test_a_batch_norm_after_a_batch_norm_is_refused() -> None:
    net = Net(lambda m, x: m.b(m.a(m.conv(x))), conv=nn.Conv2d(3, 5, 3), a=nn.BatchNorm2d(5), b=nn.BatchNorm2d(5))
    assert_refused(hostile(net), "Batch norm b follows a", "BatchNorm2d")


def test_a_batch_norm_on_the_input_is_refused() -> None:
    net = Net(lambda m, x: m.conv(m.bn(x)), conv=nn.Conv2d(3, 5, 3), bn=nn.BatchNorm2d(3))
    assert_refused(hostile(net), "bn", "does not directly follow")


@pytest.mark.parametrize("function", [functional.batch_norm, torch.batch_norm])
def test_a_functional_batch_norm_is_refused(function: Callable[..., Tensor]) -> None:
    mean, variance = torch.tensor([0.3, -1.0]).double(), torch.tensor([2.0, 0.1]).double()

    def run(m: Net, x: Tensor) -> Tensor:
        if function is functional.batch_norm:
            return function(m.conv(x), mean, variance)
        return function(m.conv(x), None, None, mean, variance, False, 0.1, 1e-5, False)

    assert_refused(hostile(Net(run, conv=nn.Conv2d(3, 2, 3))), "function batch_norm")


@pytest.mark.parametrize(
    ("branch", "culprit"),
    [
        (nn.Sequential(nn.Conv2d(5, 4, 1), nn.ReLU()), "ReLU"),
        (nn.Sequential(nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), "ReLU"),
        (nn.Sequential(nn.Conv2d(5, 4, 1), nn.Conv2d(4, 4, 1)), "Conv2d then Conv2d"),
        (nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1)), "BatchNorm2d then Conv2d"),
        (
            nn.Sequential(nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
            "Conv2d then BatchNorm2d then BatchNorm2d",
        ),
        (nn.Sequential(nn.Conv2d(5, 4, 1), nn.Dropout(0.3)), "Dropout"),
        (nn.ConvTranspose2d(5, 4, 1), "ConvTranspose2d"),
        (ParallelBranches([nn.Conv2d(5, 4, 1)]), "ParallelBranches"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_branch_that_is_not_one_convolution_and_one_batch_norm_is_refused(branch: nn.Module, culprit: str) -> None:
    assert_refused(hostile(branched([nn.Conv2d(5, 4, 1), branch])), "parallel.branches.1", culprit)


def test_a_subclass_of_convolution_in_a_branch_is_refused() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 3

    assert_refused(hostile(branched([nn.Conv2d(5, 4, 1), Scaled(5, 4, 1)])), "parallel.branches.1", "Scaled")


def test_an_empty_branch_and_no_branch_are_refused() -> None:
    # Neither can run on its own: an empty list of branches has no mean.
    with pytest.raises(ReparamError, match=r"parallel\.branches\.0"):
        branch_layers(ParallelBranches([nn.Sequential()]), "parallel")
    assert_refused(hostile(branched([])), "parallel", "no branch")


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(6, 6, 3, padding=1, stride=2),
        nn.Conv2d(6, 6, 3, padding=1, dilation=2),
        nn.Conv2d(6, 6, 3, padding=0),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(6, 6, 1),
        nn.Conv2d(6, 1, 3, padding=1),
    ],
    ids=["stride", "dilation", "padding", "groups", "padding mode", "kernel", "channels"],
)
def test_a_branch_of_another_geometry_is_refused_by_name(other: nn.Conv2d) -> None:
    branches = [nn.Conv2d(6, 6, 3, padding=1) for _ in range(2)]
    net = Net(
        lambda m, x: m.parallel(m.stem(x)), stem=nn.Conv2d(3, 6, 3), parallel=ParallelBranches([*branches, other])
    )
    assert_refused(hostile(net), "parallel.branches.2", "geometry")


HOOKS: list[Callable[[nn.Module], object]] = [
    lambda module: module.register_forward_hook(lambda _m, _inputs, output: output + 1),
    lambda module: module.register_forward_pre_hook(lambda _m, inputs: (inputs[0] * 2,)),
]


@pytest.mark.parametrize("hook", HOOKS, ids=["after", "before"])
@pytest.mark.parametrize("name", ["conv", "bn"])
def test_a_hook_on_what_is_folded_is_refused(hook: Callable[[nn.Module], object], name: str) -> None:
    net = hostile(pair())
    hook(net.get_submodule(name))
    assert_refused(net, name, "hook")


@pytest.mark.parametrize("hook", HOOKS, ids=["after", "before"])
@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("conv2.0", "conv2.0"),
        ("conv2.0.branches.1", "conv2.0.branches.1"),
        ("conv2.0.branches.1.0", "conv2.0.branches.1"),
        ("conv2.0.branches.1.1", "conv2.0.branches.1"),
    ],
)
def test_a_hook_in_a_branch_is_refused(hook: Callable[[nn.Module], object], place: str, named: str) -> None:
    net = student(placement="R1", num_branches=2)
    hook(net.get_submodule(place))
    assert_refused(net, named, "hook")


@pytest.mark.parametrize("name", ["adapters.last", "classifier.0"])
def test_a_hook_on_adapters_or_their_classifier_is_refused(name: str) -> None:
    net = student(placement="R2", num_branches=2)
    HOOKS[0](net.get_submodule(name))
    assert_refused(net, name, "hook")


def test_a_parametrized_convolution_is_refused() -> None:
    net = hostile(pair())
    parametrizations.weight_norm(net.get_submodule("conv"))
    assert_refused(net.eval(), "conv", "parametrized")


def test_a_parametrized_branch_is_refused() -> None:
    net = student(placement="R1", num_branches=2)
    parametrizations.spectral_norm(net.get_submodule("conv2.0.branches.1.0"))
    assert_refused(net.eval(), "conv2.0.branches.1", "parametrized")


@pytest.mark.parametrize(
    ("head", "between"),
    [
        (lambda m, x: m.classifier(torch.flatten(pool_to_one(functional.relu(x)), 1)), "relu"),
        (lambda m, x: m.classifier(torch.flatten(pool_to_one(x) ** 2, 1)), "pow"),
        (lambda m, x: m.classifier(torch.flatten(functional.adaptive_max_pool2d(x, 1), 1)), "adaptive_max_pool2d"),
        (lambda m, x: m.classifier(m.act(torch.flatten(pool_to_one(x), 1))), "Hardswish"),
        (lambda m, x: m.classifier(x.permute(0, 2, 3, 1)), "permute"),
        (lambda m, x: torch.flatten(pool_to_one(x), 1), "output"),
    ],
    ids=["relu", "power", "max pooling", "module", "no pooling", "no classifier"],
)
def test_adapters_that_do_not_end_in_pooling_and_a_classifier_are_refused(
    head: Callable[[Net, Tensor], Tensor], between: str
) -> None:
    net = hostile(adapted(head=head, act=nn.Hardswish()))
    assert_refused(net, "adapter", between)


def test_adapters_without_any_pooling_are_refused() -> None:
    net = adapted(head=lambda m, x: m.classifier(torch.flatten(x, 1)))
    net.classifier = nn.Linear(6 * 7 * 9, 4)
    assert_refused(hostile(net), "adapter", "Linear")


@pytest.mark.parametrize("size", [2, (1, 2), (None, 1)], ids=str)
def test_adapters_before_pooling_to_more_than_one_value_are_refused(size: int | tuple[int | None, ...]) -> None:
    pool = nn.AdaptiveAvgPool2d(size)
    net = adapted(head=lambda m, x: m.classifier(torch.flatten(pool_to_one(m.pool(x)), 1)), pool=pool)
    assert_refused(hostile(net), "adapter", "AdaptiveAvgPool2d")


def test_adapters_that_are_read_twice_are_refused() -> None:
    net = adapted(head=lambda m, x: m.classifier(torch.flatten(pool_to_one(x), 1)) + x.mean())
    assert_refused(hostile(net), "adapter", "2 users")


def test_a_classifier_that_is_called_at_two_places_is_refused() -> None:
    net = adapted(
        head=lambda m, x: m.classifier(torch.flatten(pool_to_one(x), 1)) + m.classifier(m.again(x.mean((2, 3)))),
        again=nn.Identity(),
    )
    assert_refused(hostile(net), "adapter")
    own = adapted(
        head=lambda m, x: m.classifier(m.widen(m.classifier(torch.flatten(pool_to_one(x), 1)))), widen=nn.Linear(4, 6)
    )
    assert_refused(hostile(own), "classifier", "2 places")


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv2d(5, 6, 3, padding=1),
        lambda: nn.Conv2d(5, 6, 1, stride=2),
        lambda: nn.Conv2d(5, 6, 1, padding=1),
        lambda: nn.Conv2d(5, 6, 1, padding=(0, 1)),
    ],
    ids=["kernel", "stride", "padding", "padding of one axis"],
)
def test_adapters_that_are_no_plain_pointwise_convolutions_are_refused(conv: Callable[[], nn.Module]) -> None:
    assert_refused(hostile(adapted(conv)), "adapter", "1x1")


def test_grouped_adapters_are_refused() -> None:
    net = adapted(lambda: nn.Conv2d(6, 6, 1, groups=2))
    net.stem = nn.Conv2d(3, 6, 3)
    assert_refused(hostile(net), "adapter", "1x1")


def test_a_batch_norm_after_the_classifier_of_adapters_folds_with_them() -> None:
    net = hostile(
        adapted(head=lambda m, x: m.last_bn(m.classifier(torch.flatten(pool_to_one(x), 1))), last_bn=nn.BatchNorm1d(4))
    )
    assert find_steps(net) == [ComposeAdapters("adapter", "classifier", "last_bn", True)]
    x, fused = noise(3, 3, 9, 11), fuse_student(net).module
    with torch.no_grad():
        assert relative_difference(fused(x), net(x)) <= 1e-12


@pytest.mark.parametrize("name", ["unused", "nested.1"])
def test_a_batch_norm_that_is_never_called_is_refused(name: str) -> None:
    net = pair()
    if name == "unused":
        net.unused = nn.BatchNorm2d(5)
    else:
        net.nested = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert_refused(hostile(net), name, "never called")


def test_branches_that_are_never_called_are_refused() -> None:
    net = pair()
    net.unused = ParallelBranches([nn.Conv2d(3, 3, 1)])
    assert_refused(hostile(net), "unused", "never called")


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else m.conv(x),
        lambda m, x: m.bn(m.conv(x)) if x.shape[0] > 1 else m.conv(x),
        lambda m, x: torch.stack([m.bn(m.conv(image[None])) for image in x]),
        lambda m, x: m.bn(m.conv(x * float(x.max()))),
    ],
    ids=["value", "shape", "loop", "conversion"],
)
def test_control_flow_that_depends_on_the_data_is_refused(run: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(run, conv=nn.Conv2d(3, 5, 3), bn=nn.BatchNorm2d(5))
    assert_refused(hostile(net), "Net", "cannot be traced")


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda m, x: m.bn(input=m.conv(x)), "bn"),
        (lambda m, x: m.bn(m.conv(input=x)), "conv"),
    ],
)
def test_a_call_by_keyword_is_refused(run: Callable[[Net, Tensor], Tensor], name: str) -> None:
    net = Net(run, conv=nn.Conv2d(3, 5, 3), bn=nn.BatchNorm2d(5))
    assert_refused(hostile(net), name, "positional")


def test_a_refusal_leaves_the_module_untouched() -> None:
    net = hostile(branched([nn.Conv2d(5, 4, 1), nn.Sequential(nn.Conv2d(5, 4, 1), nn.ReLU())]))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ReparamError):
        fuse_student(net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not randomize(net).training


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation inside, as timm's BatchNormAct2d."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return functional.relu(super().forward(input))


class RenamedNorm(nn.BatchNorm2d):
    """A batch norm of another name that computes the same."""


def test_a_batch_norm_of_another_class_is_folded_only_if_it_computes_the_same() -> None:
    assert find_steps(hostile(pair(batch_norm=RenamedNorm(5)))) == [FoldPair("conv", "bn")]
    for norm in (NormAct(5), FrozenBatchNorm2d(5)):
        with pytest.raises(ReparamError, match=rf"bn is a {type(norm).__name__}, which may compute more"):
            find_steps(hostile(pair(batch_norm=norm)))
