import copy
import json
import math
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdexport.students import STUDENTS, Tapped
from tests.training.distillers.random_branches import SHAPE, drawn
from training.diffusion import SCHEDULES, expected_loss_form, reverse_process_loss
from training.distillers.average import Average
from training.distillers.branched import BranchedDistiller, LayerMatch
from training.distillers.diversity import as_floats, branch_diversity
from training.distillers.kdiffusion import KDiffusion
from training.distillers.settings import AverageSettings, KDiffusionSettings
from training.quadratic import loss_form
from training.teachers import TEACHERS

Array = NDArray[np.float64]
LAYERS = {"last": ("stage3", 1280, 64), "stage3": ("stage2", 48, 32), "stage2": ("stage1", 16, 16)}


def pearson(a: Array, b: Array) -> float:
    """Over images and places, each channel around its own mean."""
    x, y = (np.moveaxis(v, 1, 0).reshape(3, -1) for v in (a, b))
    x, y = (v - v.mean(1, keepdims=True) for v in (x, y))
    return float(np.sum(x * y) / math.sqrt(np.sum(x**2) * np.sum(y**2)))


def test_correlations_are_pearsons_around_the_mean_of_each_channel() -> None:
    branches, target = drawn()
    measured = branch_diversity(branches, target)
    z, x0 = branches.numpy(), target.numpy()
    for i in range(4):
        for j in range(4):
            expected = pearson(x0 - z[i], x0 - z[j])
            assert measured.error_correlation[i, j].item() == pytest.approx(expected, abs=1e-12)
            assert measured.feature_correlation[i, j].item() == pytest.approx(pearson(z[i], z[j]), abs=1e-12)
    assert 0.3 < measured.error_correlation[0, 1].item() < 0.97
    assert measured.loss_share is None


def test_what_averaging_gains_is_the_variance_among_branches() -> None:
    branches, target = drawn()
    measured = branch_diversity(branches, target)
    z, x0 = branches.numpy(), target.numpy()
    np.testing.assert_allclose(measured.squared_error, np.mean((x0 - z) ** 2, axis=(1, 2, 3, 4)), rtol=1e-13)
    assert measured.squared_error_of_mean.item() == pytest.approx(float(np.mean((x0 - z.mean(0)) ** 2)), rel=1e-13)
    assert measured.ambiguity.item() == pytest.approx(float(np.mean(z.var(axis=0))), rel=1e-10)
    alike = branch_diversity(branches[:1].expand(4, *SHAPE), target)
    assert alike.ambiguity.item() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(alike.error_correlation, np.ones((4, 4)), atol=1e-12)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_shares_are_half_the_logarithmic_slopes_of_the_loss(name: str) -> None:
    branches, target = drawn()
    schedule = SCHEDULES[name](4)
    fixed = torch.tensor(loss_form(schedule.steps, (1.0,) * 4), dtype=torch.float64)
    for form, permutation in ((fixed, (0, 1, 2, 3)), (torch.tensor(expected_loss_form(schedule)), "expected")):
        share = branch_diversity(branches, target, form.double()).loss_share
        assert share is not None
        slopes, step = [], 1e-5
        for j in range(4):
            losses = []
            for sign in (1, -1):
                scaled = target - branches
                scaled[j] *= 1 + sign * step
                losses.append(reverse_process_loss(target - scaled, target, schedule, permutation).log().item())  # type: ignore[arg-type]
            slopes.append((losses[0] - losses[1]) / (2 * step) / 2)
        np.testing.assert_allclose(share, slopes, rtol=1e-6)
        assert share.sum().item() == pytest.approx(1, rel=1e-12)


def test_a_branch_that_never_varies_and_a_loss_of_zero_stay_finite() -> None:
    branches, target = drawn()
    branches[2] = torch.tensor([0.1, -7.3, 1e3]).reshape(3, 1, 1)
    measured = branch_diversity(branches, target)
    assert measured.feature_correlation[2].tolist() == [0.0] * 4
    exact = branch_diversity(target.expand(3, *SHAPE), target, torch.eye(3))
    assert as_floats(exact.scalars())["loss_share/branch2"] == 0.0
    assert all(math.isfinite(value) for value in as_floats(exact.scalars()).values())


def test_scalars_are_a_flat_line_of_json() -> None:
    branches, target = drawn(3)
    measured = branch_diversity(branches, target, torch.eye(3))
    line = as_floats(measured.scalars())
    pairs = [measured.error_correlation[i, j].item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert line["error_correlation/mean"] == pytest.approx(np.mean(pairs))
    assert line["error_correlation/min"] == min(pairs)
    assert line["error_correlation/max"] == max(pairs)
    assert [line[f"squared_error/branch{j + 1}"] for j in range(3)] == measured.squared_error.tolist()
    assert json.loads(json.dumps(line)) == line
    assert len(line) == 2 + 6 + 6
    assert as_floats({}) == {}
    # One branch has no pair.
    assert set(branch_diversity(*drawn(1)).scalars()) == {"squared_error_of_mean", "ambiguity", "squared_error/branch1"}


def test_shapes_that_do_not_fit_are_refused() -> None:
    branches, target = drawn()
    with pytest.raises(
        ValueError, match=r"^branches must be .* but the shapes are \(4, 5, 3, 2, 4\) and \(4, 3, 2, 4\)$"
    ):
        branch_diversity(branches, target[1:])


def distilled(kind: type[BranchedDistiller], **changes: object) -> BranchedDistiller:
    torch.manual_seed(5)
    model = KDiffusionSettings if kind is KDiffusion else AverageSettings
    settings = model.model_validate({"num_branches": 3, "layers": "multi", **changes})
    teacher = TEACHERS.build("resnet8", num_classes=5, image_size=32)
    student = STUDENTS.build("mobilenetv2", num_classes=5, image_size=32)
    distiller = kind(settings=settings, student=student, teacher=teacher)
    for layer in distiller.layers.values():
        layer.teacher_mean.uniform_(-1, 1)  # type: ignore[operator]
        layer.teacher_std.uniform_(0.5, 2)  # type: ignore[operator]
        norm = cast(nn.BatchNorm2d, cast(nn.Sequential, layer.bridge)[1])
        cast(Tensor, norm.running_mean).uniform_(-1, 1)
        cast(Tensor, norm.running_var).uniform_(0.5, 2)
    return distiller


def features(seed: int = 1) -> tuple[Tapped, dict[str, list[Tensor]]]:
    """Outputs of a teacher and of three branches of each layer, with the sizes that they have at 32 pixels."""
    generator = torch.Generator().manual_seed(seed)
    sides = {"last": (8, 2), "stage3": (16, 4), "stage2": (32, 8)}
    theirs, ours = {}, {}
    for name, (stage, channels, width) in LAYERS.items():
        teacher_side, side = sides[name]
        theirs[stage] = torch.randn(4, width, teacher_side, teacher_side, generator=generator)
        ours[name] = [torch.randn(4, channels, side, side, generator=generator) for _ in range(3)]
    return Tapped(features=theirs, preactivations={}, pooled=theirs["stage3"], logits=theirs["stage3"]), ours


def test_a_distiller_measures_in_evaluation_mode_and_changes_nothing() -> None:
    distiller = distilled(KDiffusion)
    distiller.train()
    # A module that was already in evaluation mode stays in it.
    cast(LayerMatch, distiller.layers["last"]).bridge.eval()
    modes = [module.training for module in distiller.modules()]
    before, random = copy.deepcopy(distiller.state_dict()), torch.get_rng_state()
    teacher, branches = features()
    first = distiller.diversity(teacher, branches, teacher)
    assert [module.training for module in distiller.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in distiller.state_dict().items())
    assert not any(value.requires_grad for value in first.values())
    assert as_floats(distiller.eval().diversity(teacher, branches, teacher)) == as_floats(first)
    assert {name.split("/")[0] for name in first} == set(LAYERS)
    layer = distiller.layers["stage3"]
    bridged, target = layer(branches["stage3"], teacher.features["stage2"])
    expected = (target - bridged).detach().square().mean((1, 2, 3, 4))
    found = [first[f"stage3/squared_error/branch{j + 1}"].item() for j in range(3)]
    assert found == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Average, {}),
        (KDiffusion, {}),
        (KDiffusion, {"permutation": "expected", "step_weights": "inverse_v2"}),
        (KDiffusion, {"permutation": "fixed", "schedule": "linear"}),
    ],
)
def test_the_form_of_a_method_is_that_of_its_loss(kind: type[BranchedDistiller], changes: dict[str, object]) -> None:
    distiller = distilled(kind, **changes)
    branches, target = drawn(3)
    form = torch.tensor(distiller.loss_form(), dtype=torch.float64)
    errors = (target - branches).flatten(1)
    value = (form * (errors @ errors.T)).sum() / errors.shape[1]
    orders = [None]
    if changes == {}:
        orders = [torch.tensor(order) for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))]  # type: ignore[misc]
    losses = torch.stack([distiller.distance(branches, target, order) for order in orders])
    torch.testing.assert_close(value, losses.mean(), rtol=1e-12, atol=0)


def test_the_marginal_trajectory_has_no_shares() -> None:
    distiller = distilled(KDiffusion, trajectory="marginal")
    teacher, branches = features()
    assert not [name for name in distiller.diversity(teacher, branches, teacher) if "loss_share" in name]
