import pytest
import torch
from torch import nn

from training.batch_norms import set_momentum, slow_statistics


def network(*momenta: float | None) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 1), *(nn.BatchNorm2d(3, momentum=momentum) for momentum in momenta))


def test_a_momentum_of_the_recipe_replaces_that_of_every_batch_norm() -> None:
    net = network(0.01, 0.3, None)
    set_momentum(net, None)
    assert [module.momentum for module in net if isinstance(module, nn.BatchNorm2d)] == [0.01, 0.3, None]
    set_momentum(net, 0.2)
    first = net[1]
    assert isinstance(first, nn.BatchNorm2d)
    assert first.running_mean is not None
    before = first.running_mean.clone()
    images = torch.randn(8, 3, 4, 4) + 2
    net.train()(images)
    expected = 0.8 * before + 0.2 * net[0](images).mean((0, 2, 3))
    torch.testing.assert_close(first.running_mean, expected)


@pytest.mark.parametrize(
    ("momentum", "steps", "remedy"),
    [
        (0.01, 499, "set train.batch_norm_momentum=0.02, or train longer"),
        (0.01, 501, ""),
        (0.1, 40, "set train.batch_norm_momentum=0.13, or train longer"),
        (0.1, 8, "learned: train longer"),
    ],
)
def test_statistics_that_cannot_follow_a_run_are_said_with_what_to_set(
    momentum: float, steps: int, remedy: str
) -> None:
    note = slow_statistics(network(0.5, momentum), steps)
    assert bool(note) == bool(remedy)
    if note:
        assert f"still to {(1 - momentum) ** steps:.0%} those before the training" in note
        assert note.endswith(remedy)


def test_networks_whose_statistics_are_plain_means_or_absent_are_never_slow() -> None:
    assert slow_statistics(network(None), 1) == ""
    assert slow_statistics(nn.Linear(2, 2), 1) == ""
