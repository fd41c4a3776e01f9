import copy
import json
import math
import sys
import weakref
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from kdexport.errors import BackendUnavailableError, DataError
from kdexport.reparam.branches import ParallelBranches
from kdexport.students import STUDENTS, Tapped
from tests.training.distilled import assemble, batch
from training.diffusion import SCHEDULES, expected_loss_form, reverse_process_loss
from training.distillers.average import Average
from training.distillers.branched import BranchedDistiller, LayerMatch
from training.distillers.diversity import as_floats, branch_diversity
from training.distillers.kdiffusion import KDiffusion
from training.distillers.settings import AverageSettings, KDiffusionSettings
from training.quadratic import loss_form
from training.runs.plots import plot_diversity, plot_learning_curves, read_lines
from training.teachers import TEACHERS

Array = NDArray[np.float64]
SHAPE = (5, 3, 2, 4)
LAYERS = {"last": ("stage3", 1280, 64), "stage3": ("stage2", 48, 32), "stage2": ("stage1", 16, 16)}


def drawn(count: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Branches that share most of their error, each with its own scale, channels far apart; and their target."""
    rng = np.random.default_rng(seed)
    target = rng.normal(0.3, 1.5, SHAPE)
    shared, away = rng.normal(size=SHAPE), 10 * rng.normal(size=(1, 3, 1, 1))
    errors = [(0.4 + 0.3 * j) * (shared + 0.5 * rng.normal(size=SHAPE)) + away for j in range(count)]
    return torch.from_numpy(target - np.stack(errors)), torch.from_numpy(target)


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
        ValueError, match=r"branches \(4, 5, 3, 2, 4\) are not \(m,N,C,h,w\) over a target \(4, 3, 2, 4\)"
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
    """What a teacher and three branches of each layer say, of the sizes that they have at 32 pixels."""
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
    # A part that someone has set apart stays so.
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


def run_lines(epochs: int) -> list[dict[str, float]]:
    return [
        {
            "epoch": epoch,
            "loss/cross_entropy": 4.0 / epoch,
            "loss/diffusion": 2.0 / epoch**2,
            "top1": 0.7 - 0.5 / epoch,
            "lr": 0.1 * 0.1 ** (epoch // 4),
        }
        for epoch in range(1, epochs + 1)
    ]


def diversity_lines(epochs: int, layers: tuple[str, ...] = ("stage3", "last")) -> list[dict[str, float]]:
    lines = []
    for epoch in range(1, epochs + 1):
        line: dict[str, float] = {"epoch": epoch}
        for number, layer in enumerate(layers):
            branches, target = drawn(4, seed=10 * epoch + number)
            measured = branch_diversity(branches, target, torch.eye(4))
            line.update({f"{layer}/{name}": value for name, value in as_floats(measured.scalars()).items()})
        lines.append(line)
    return lines


def inked(path: Path) -> tuple[tuple[int, int], int]:
    """(width, height), and how many pixels are coloured."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
        return image.size, int((np.ptp(pixels, axis=2) > 40).sum())


@pytest.mark.parametrize("epochs", [1, 7])
def test_plots_are_drawn_and_the_same_lines_give_the_same_file(tmp_path: Path, epochs: int) -> None:
    curves, again, diversity = (tmp_path / f"{name}.png" for name in ("curves", "again", "diversity"))
    plot_learning_curves(run_lines(epochs), curves, title="resnet8 -> mobilenetv2")
    plot_learning_curves(run_lines(epochs), again, title="resnet8 -> mobilenetv2")
    assert curves.read_bytes() == again.read_bytes()
    plot_diversity(diversity_lines(epochs), diversity)
    assert inked(curves)[1] > 100
    assert inked(diversity)[1] > 200
    # A row for each of two layers.
    assert inked(diversity)[0] == (inked(curves)[0][0], 2 * inked(curves)[0][1])
    # No figure is left behind in a global registry, and none was made there.
    assert "matplotlib.pyplot" not in sys.modules


def test_the_teachers_top1_is_a_line_of_its_own(tmp_path: Path) -> None:
    plot_learning_curves(run_lines(5), tmp_path / "without.png")
    plot_learning_curves(run_lines(5), tmp_path / "with.png", teacher_top1=0.65)
    assert (tmp_path / "without.png").read_bytes() != (tmp_path / "with.png").read_bytes()


def test_lines_may_lack_what_other_lines_have(tmp_path: Path) -> None:
    lines = [{"epoch": 1, "lr": 0.1, "top1": 0.2}, *run_lines(3)[1:]]
    plot_learning_curves(lines, tmp_path / "curves.png")
    assert inked(tmp_path / "curves.png")[1] > 100
    one_branch = [{"epoch": 1, **{f"last/{k}": v for k, v in as_floats(branch_diversity(*drawn(1)).scalars()).items()}}]
    plot_diversity(one_branch, tmp_path / "diversity.png")


def test_what_cannot_be_plotted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="There is no epoch to plot"):
        plot_learning_curves([], tmp_path / "x.png")
    with pytest.raises(DataError, match="No line has the diversity of a layer"):
        plot_diversity(run_lines(2), tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match=r"Plots need matplotlib(?s:.)*kdexport\[plots\]"):
        plot_learning_curves(run_lines(2), tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_lines_are_read_from_the_file_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in run_lines(3)))
    assert read_lines(path) == run_lines(3)
    path.write_text('{"epoch": 1}\n["no", "object"]\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2, is no object of numbers"):
        read_lines(path)
    path.write_text('{"epoch": 1, "top1": ')
    with pytest.raises(DataError, match="cannot be read"):
        read_lines(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_lines(tmp_path / "none.jsonl")


def test_a_task_measures_its_student_in_evaluation_mode_and_changes_nothing() -> None:
    parts = assemble("kdiffusion", layers="multi", num_branches=3)
    parts.task.train()
    images, _ = batch(0)
    before, random = copy.deepcopy(parts.task.state_dict()), torch.get_rng_state()
    measured = parts.task.diversity(images, parts.frozen(images))
    assert all(module.training for module in parts.task.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in parts.task.state_dict().items())
    # The deepest layer, by hand: each branch of the student behind the bridge.
    parts.task.eval()
    seen: list[Tensor] = []
    host = cast(ParallelBranches, parts.student.get_submodule("conv2.0"))
    host.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        parts.student(images)
        match = cast(LayerMatch, parts.distiller.layers["last"])  # type: ignore[index]
        target = (parts.frozen(images).features["stage3"] - match.teacher_mean) / match.teacher_std
        target = nn.functional.adaptive_avg_pool2d(target, 1)
        errors = [(match.bridge(branch(seen[0])) - target).square().mean().item() for branch in host.branches]
    found = [measured[f"last/squared_error/branch{index + 1}"] for index in range(3)]
    assert found == pytest.approx(errors, rel=1e-4)
    assert parts.task.diversity(images, parts.frozen(images)) == measured


def test_evaluation_keeps_no_features_of_branches() -> None:
    parts = assemble("average")
    images, _ = batch(0)
    kept: list[weakref.ref[Tensor]] = []
    first = cast(ParallelBranches, parts.student.get_submodule("conv2.0")).branches[0]
    first.register_forward_hook(lambda _module, _inputs, output: kept.append(weakref.ref(output)))
    for mode in (True, False):
        parts.student.train(mode)
        with torch.no_grad():
            parts.student(images)
    assert [reference() for reference in kept] == [None, None]


def test_only_branches_can_differ() -> None:
    parts = assemble("kd")
    images, _ = batch(0)
    with pytest.raises(TypeError, match="KD has no branches"):
        parts.task.diversity(images, parts.frozen(images))
