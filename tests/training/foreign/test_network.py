"""Foreign networks compute what they compute without us, and their features are those of their modules."""

import copy

import pytest
import torch
from torch import Tensor, nn

from kdexport.errors import ConfigError
from kdexport.reparam.blocks import BranchSpec, attach_branches
from tests.training.foreign.small_networks import SIZE, ReadTwice, Residual, Several, Tokens, Twice, hostile
from training.foreign.network import ForeignStudent, ForeignTeacher
from training.runs.task import FrozenTeacher

TAPS = {"stem": "bn1", "stage1": "relu", "stage2": "end"}


def images(seed: int = 5) -> Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def residual() -> nn.Module:
    torch.manual_seed(3)
    return hostile(Residual()).eval()


def by_hand(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The values inside ``Residual``, computed layer by layer."""
    get = network.get_submodule
    values = {"bn1": get("bn1")(get("conv1")(x))}
    first = values["bn1"].relu()
    values["bn2"] = get("bn2")(get("conv2")(first))
    values["sum"] = get("bn4")(get("conv4")(values["bn2"].relu())) + get("bn3")(get("shortcut")(first))
    values["pooled"] = values["sum"].relu().mean((2, 3))
    return {**values, "logits": get("head")(values["pooled"])}


def test_features_are_what_the_modules_compute_and_logits_are_unchanged() -> None:
    network = residual()
    with torch.no_grad():
        expected, logits = by_hand(network, images()), network(images())
        teacher = ForeignTeacher(copy.deepcopy(network), TAPS, image_size=SIZE, name="mine").eval()
        tapped = teacher.tapped(images())
    assert torch.equal(tapped.logits, logits)
    assert torch.equal(teacher(images()), logits)
    torch.testing.assert_close(tapped.logits, expected["logits"])
    # The functional ReLU after bn1 and the one in place after the sum do not reach the features before them.
    torch.testing.assert_close(tapped.features["stem"], expected["bn1"])
    torch.testing.assert_close(tapped.features["stage1"], expected["bn2"].relu())
    torch.testing.assert_close(tapped.preactivations["stage1"], expected["bn2"])
    torch.testing.assert_close(tapped.features["stage2"], expected["sum"].relu())
    torch.testing.assert_close(tapped.preactivations["stage2"], expected["sum"])
    torch.testing.assert_close(tapped.pooled, expected["pooled"])
    assert [(tap.name, tap.channels, tap.stride) for tap in teacher.taps] == [
        ("stem", 6, 2),
        ("stage1", 10, 4),
        ("stage2", 10, 4),
    ]
    assert teacher.plan.pools_by_average
    assert teacher.classifier_path == "network.head"


def test_probing_leaves_the_network_as_it_was() -> None:
    network = residual().train()
    network.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ForeignStudent(network, TAPS, image_size=SIZE, name="mine")
    assert all(part.training for part in network.modules())
    assert not any(value.requires_grad for value in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_a_frozen_foreign_teacher_gives_its_own_outputs() -> None:
    network = residual()
    logits = network(images()).detach()
    teacher = ForeignTeacher(network, TAPS, image_size=SIZE, name="mine")
    frozen = FrozenTeacher(teacher, torch.device("cpu"), None)
    torch.testing.assert_close(frozen(images()).logits, logits)


def test_tokens_are_read_as_a_map_and_the_class_token_as_the_pooled_vector() -> None:
    torch.manual_seed(1)
    network = Tokens().eval()
    teacher = ForeignTeacher(network, {"stage1": "block"}, image_size=SIZE, name="mine").eval()
    with torch.no_grad():
        tapped = teacher.tapped(images())
        patches = network.patches(images()).flatten(2).transpose(1, 2)
        tokens = network.block(torch.cat([network.token.expand(3, -1, -1), patches], 1))
    torch.testing.assert_close(tapped.features["stage1"][:, :, 2, 1], tokens[:, 1 + 2 * 4 + 1])
    torch.testing.assert_close(tapped.pooled, tokens[:, 0])
    assert not teacher.plan.pools_by_average
    assert (teacher.taps[0].channels, teacher.taps[0].stride) == (12, 8)


def test_hosts_are_the_pairs_that_write_a_tap() -> None:
    student = ForeignStudent(residual(), TAPS, image_size=SIZE, name="mine")
    assert [(host.tap, host.conv, host.batch_norm) for host in student.hosts] == [
        ("stem", "network.conv1", "network.bn1"),
        ("stage1", "network.conv2", "network.bn2"),
        # Of the sum, the branch and not the shortcut.
        ("stage2", "network.conv4", "network.bn4"),
    ]


def test_branches_on_a_foreign_student_fold_exactly() -> None:
    student = ForeignStudent(residual(), TAPS, image_size=SIZE, name="mine")
    spec = BranchSpec(placement="R1", num_branches=3, adapter_channels=None, layers=("stage1", "stage2"))
    attach_branches(student, spec)
    student.train()
    for seed in range(3):
        student(images(seed))
    hostile(student).double().eval()
    x = images().double()
    with torch.no_grad():
        tapped = student.tapped(x)
        get = student.network.get_submodule
        given = get("bn1")(get("conv1")(x)).relu()
        own = torch.stack([branch(given) for branch in get("conv2").get_submodule("branches").children()])
    # The next layer reads the mean of the branches, and the batch norm of the host is gone.
    torch.testing.assert_close(tapped.preactivations["stage1"], own.mean(0))
    assert isinstance(student.get_submodule("network.bn2"), nn.Identity)


def refused(network: nn.Module, taps: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        ForeignStudent(network, taps, image_size=SIZE, name="mine")
    return caught.value.message


def no_host(network: nn.Module, path: str) -> str:
    student = ForeignStudent(network, {"stage1": path}, image_size=SIZE, name="mine")
    assert student.hosts == ()
    return student.plan.taps[0].no_host


def test_pairs_that_could_not_be_replaced_exactly_are_no_hosts() -> None:
    assert no_host(ReadTwice(), "out") == "the output of the convolution 'conv' has 2 readers, not only the batch norm"
    assert no_host(Twice(), "norm") == "the convolution 'again' runs 2 times in a forward pass"
    assert no_host(Tokens(), "block") == "no batch norm writes 'block'"


def test_taps_that_cannot_be_read_are_refused_by_name() -> None:
    assert refused(residual(), {"stage1": "layer9"}) == "The tap stage1 = 'layer9' is not a module of the network."
    assert "The tap stage1 = 'again' is called 2 times" in refused(Twice(), {"stage1": "again"})
    wrong = refused(residual(), {"stage1": "end", "stage2": "relu"})
    assert wrong == "The taps are in the wrong order: stage1 = 'end' is computed after stage2 = 'relu'."


def test_a_network_with_another_output_is_refused() -> None:
    assert "in training mode, returns tuple for 2 images" in refused(Several(), {})
    assert "fails on images of 32x32 pixels: RuntimeError" in refused(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), {})
    assert "returns (2, 4, 32, 32) for 2 images" in refused(nn.Conv2d(3, 4, 1), {})


def test_an_activation_without_a_module_hides_the_preactivation() -> None:
    class Functional(Residual):
        def forward(self, x: Tensor) -> Tensor:
            y = self.block(x)
            return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]

        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 10, 3, 4, 1), nn.BatchNorm2d(10)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu(self.norm(self.conv(x)))

    teacher = ForeignTeacher(Functional(), {"stage1": "block"}, image_size=SIZE, name="mine")
    assert teacher.plan.taps[0].hidden == "it ends with a function (relu), not a module"
    assert teacher.tapped(images()).preactivations == {}
    # Its batch norm is found all the same: branches replace what is before the activation.
    assert teacher.plan.taps[0].host is not None


@pytest.mark.parametrize(
    ("name", "taps", "classifier"),
    [
        ("shufflenet_v2_x0_5", {"stage1": "stage2", "stage2": "stage3", "stage3": "stage4", "last": "conv5"}, "fc"),
        ("mobilenet_v3_small", {"stage1": "features.3", "stage2": "features.8", "last": "features.12"}, "classifier.3"),
    ],
)
def test_networks_of_torchvision(name: str, taps: dict[str, str], classifier: str) -> None:
    from torchvision import models

    torch.manual_seed(0)
    network = hostile(getattr(models, name)(num_classes=7)).eval()
    logits = network(images()).detach()
    student = ForeignStudent(network, taps, image_size=SIZE, name=name).eval()
    tapped = student.tapped(images())
    torch.testing.assert_close(tapped.logits, logits)
    assert student.plan.classifier == classifier
    assert [host.tap for host in student.hosts] == list(taps)
    for tap in student.taps:
        side = -(-SIZE // tap.stride)
        assert tapped.features[tap.name].shape == (3, tap.channels, side, side)


def test_a_network_of_timm() -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("mobilenetv4_conv_small_050", num_classes=7, pretrained=False)
    taps = {"stage1": "blocks.1", "stage2": "blocks.2", "stage3": "blocks.3"}
    student = ForeignStudent(network, taps, image_size=64, name="timm:mobilenetv4_conv_small_050")
    assert [host.tap for host in student.hosts] == ["stage2", "stage3"]
    assert "BatchNormAct2d, which also applies ReLU" in student.plan.taps[0].no_host
