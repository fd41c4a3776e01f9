import copy
import itertools
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.checkpoint import StudentSpec, build_student
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import ConfigError
from kdexport.reparam.blocks import BranchSpec, attach_branches, branch_paths
from kdexport.reparam.branches import ParallelBranches
from kdexport.reparam.fold_student import fuse_student
from kdexport.students import STUDENTS, Student, Tapped
from tests.kdexport.hostile_values import relative_difference
from training.diffusion import (
    SCHEDULES,
    Backpropagation,
    MarginalOptions,
    StepWeights,
    Trajectory,
    reverse_process_loss,
    step_weights_of,
)
from training.distillers.branched import LayerMatch
from training.distillers.distiller import StepContext
from training.distillers.guide import TargetGuide
from training.distillers.kdiffusion import KDiffusion
from training.distillers.pairs import paired_stages
from training.distillers.settings import KDiffusionSettings
from training.recipe import load_recipe
from training.runs.task import DistillationTask, FrozenTeacher, StepResult
from training.teachers import TEACHERS, Teacher

CLASSES, SIZE, BRANCHES, WIDTH = 5, 32, 3, 64
PLACEMENTS = pytest.mark.parametrize("placement", ["R1", "R2"])
#: A shift before a 1x1 convolution with batch norm is taken out again by the latter: its gradient is rounding noise.
CANCELLED = "conv.7.bias"
ORDER = (2, 0, 1)


def context(epoch: float = 99.5, order: tuple[int, ...] = ORDER, labels: Tensor | None = None) -> StepContext:
    """One order for each of three layers."""
    return StepContext(
        epoch=torch.tensor(epoch),
        orders=torch.tensor([order] * 3),
        labels=torch.zeros(1, dtype=torch.int64) if labels is None else labels,
        samples=torch.arange(1 if labels is None else len(labels)),
    )


@dataclass(frozen=True, kw_only=True)
class Parts:
    student: Student
    teacher: Teacher
    frozen: FrozenTeacher
    distiller: KDiffusion
    parallel: ParallelBranches
    spec: BranchSpec
    task: DistillationTask

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        return cast(StepResult, self.task(images, self.frozen(images), context(labels=labels)))


def hostile(module: nn.Module, seed: int) -> None:
    """Statistics and scales of every batch norm far from those of a fresh one."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in ((norm.weight, 0.5, 2), (norm.bias, -0.7, 0.9), (norm.running_mean, -0.6, 0.4)):
                assert tensor is not None
                tensor.data.uniform_(low, high, generator=generator)
            assert norm.running_var is not None
            norm.running_var.uniform_(0.3, 3, generator=generator)


def assemble(placement: str, **changes: object) -> Parts:
    torch.manual_seed(8)
    settings = KDiffusionSettings.model_validate(
        {"placement": placement, "num_branches": BRANCHES, "weight": 2.5, "ramp_epochs": 4.0, **changes}
    )
    teacher = TEACHERS.build("resnet8", num_classes=CLASSES, image_size=SIZE)
    student = STUDENTS.build("mobilenetv2", num_classes=CLASSES, image_size=SIZE)
    distiller = KDiffusion(settings=settings, student=student, teacher=teacher)
    spec = KDiffusion.branch_spec(settings, student, teacher)
    attach_branches(student, spec)
    parallel = student.get_submodule(branch_paths(student, spec)["last"])
    assert isinstance(parallel, ParallelBranches)
    for seed, module in enumerate((teacher, student, distiller)):
        hostile(module, seed)
    return Parts(
        student=student,
        teacher=teacher,
        frozen=FrozenTeacher(teacher, torch.device("cpu"), None),
        distiller=distiller,
        parallel=parallel,
        spec=spec,
        task=DistillationTask(student, distiller, {"last": parallel}),
    )


@cache
def networks() -> tuple[Student, Teacher]:
    """Networks that no test changes: without branches, and a frozen teacher of hostile statistics."""
    torch.manual_seed(8)
    teacher = TEACHERS.build("resnet8", num_classes=CLASSES, image_size=SIZE)
    hostile(teacher, 0)
    return STUDENTS.build("mobilenetv2", num_classes=CLASSES, image_size=SIZE), teacher.eval().requires_grad_(False)


def bare(placement: object = "R2", **changes: object) -> KDiffusion:
    """A distiller of three branches without its task, whose weight is 1 from the start."""
    student, teacher = networks()
    settings = KDiffusionSettings.model_validate(
        {"placement": placement, "num_branches": BRANCHES, "weight": 1.0, "ramp_epochs": 0.0, **changes}
    )
    distiller = KDiffusion(settings=settings, student=student, teacher=teacher)
    hostile(distiller, 2)
    return distiller


@cache
def taught(count: int = 6) -> Tapped:
    with torch.no_grad():
        return networks()[1].tapped(batch(count)[0])


def batch(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator) * 1.4 + 0.3
    return images, torch.randint(CLASSES, (count,), generator=generator)


def teacher_features(count: int, seed: int) -> Tensor:
    """(count,64,8,8) with another mean and spread in each channel; channel 5 is always zero."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.05, 9, WIDTH).reshape(1, -1, 1, 1)
    features = torch.randn(count, WIDTH, 8, 8, generator=generator) * spread + spread.flip(1) - 4
    features[:, 5] = 0
    return features


def tapped(feature: Tensor) -> Tapped:
    """The outputs of a teacher whose last stage gives ``feature``."""
    return Tapped(features={"stage3": feature}, preactivations={}, pooled=feature, logits=feature)


def diffusion(distiller: KDiffusion, branches: list[Tensor], feature: Tensor, step: StepContext) -> Tensor:
    losses = distiller(tapped(feature), {"last": branches}, tapped(feature), step)
    return cast(Tensor, losses["diffusion"])


def match(distiller: KDiffusion) -> LayerMatch:
    return cast(LayerMatch, distiller.layers["last"])


def pooled(features: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """8x8 maps to 2x2, by the mean of each quarter."""
    array = features.double().numpy()
    return np.asarray(array.reshape(*array.shape[:2], 2, 4, 2, 4).mean((3, 5)))


def hosts_of(target: Tensor, distiller: LayerMatch) -> Tensor:
    """Branch features that the bridge maps onto ``target``."""
    if isinstance(distiller.bridge, nn.Identity):
        return target
    conv, norm = cast(nn.Sequential, distiller.bridge)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    column = (1, -1, 1, 1)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    before = (target.double() - norm.bias.reshape(column)) / scale.reshape(column) + norm.running_mean.reshape(column)
    inverse = torch.linalg.pinv(conv.weight.double().flatten(1))
    return torch.einsum("sc,nchw->nshw", inverse, before).float().detach()


@PLACEMENTS
@pytest.mark.parametrize("permutation", ["shuffle", "fixed", "expected"])
def test_the_loss_is_zero_where_every_bridged_branch_is_the_standardised_teacher(
    placement: str, permutation: str
) -> None:
    parts = assemble(placement, permutation=permutation)
    feature = teacher_features(7, seed=1)
    parts.distiller.calibrate([tapped(teacher_features(40, seed=2))])
    # The bridge's own statistics, so that what it computes can be inverted.
    parts.distiller.eval()
    spread = pooled(teacher_features(40, seed=2))
    centre = spread.mean((0, 2, 3), keepdims=True)
    scale = np.maximum(spread.std((0, 2, 3), ddof=1, keepdims=True), 1e-3)
    target = torch.from_numpy((pooled(feature) - centre) / scale).float()
    exact = hosts_of(target, match(parts.distiller))
    assert diffusion(parts.distiller, [exact] * BRANCHES, feature, context()).item() < 1e-9
    for index in range(BRANCHES):
        branches = [exact] * BRANCHES
        branches[index] = hosts_of(target + 0.1, match(parts.distiller))
        assert diffusion(parts.distiller, branches, feature, context()).item() > 1e-4


def test_without_standardisation_the_target_is_the_raw_teacher() -> None:
    parts = assemble("R2", teacher_normalisation="raw")
    parts.distiller.calibrate([tapped(teacher_features(40, seed=2))])
    feature = teacher_features(7, seed=1)
    exact = torch.from_numpy(pooled(feature)).float()
    assert diffusion(parts.distiller, [exact] * BRANCHES, feature, context()).item() < 1e-9


def test_calibration_gives_the_pooled_feature_zero_mean_and_unit_variance() -> None:
    whole = assemble("R1").distiller
    batches = [teacher_features(count, seed=count) for count in (9, 4, 7)]
    whole.calibrate([tapped(features) for features in batches])
    distiller = match(whole)
    everything = np.concatenate([pooled(features) for features in batches])
    standardised = (everything - distiller.teacher_mean.double().numpy()) / distiller.teacher_std.double().numpy()
    speaking = [channel for channel in range(WIDTH) if channel != 5]
    np.testing.assert_allclose(standardised.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(standardised.var((0, 2, 3), ddof=1)[speaking], 1, rtol=1e-5)
    # A channel that is always zero stays zero: it is not scaled up.
    assert standardised[:, 5].tolist() == np.zeros((20, 2, 2)).tolist()
    assert distiller.teacher_std[0, 5].item() == pytest.approx(1e-3)


@PLACEMENTS
def test_the_diffusion_loss_reaches_every_branch_and_the_bridge(placement: str) -> None:
    parts = assemble(placement)
    images, labels = batch()
    parts.step(images, labels).losses["diffusion"].backward()  # type: ignore[no-untyped-call]
    reached = [*parts.parallel.branches.parameters(), *parts.distiller.parameters()]
    assert len(reached) == 3 * BRANCHES + (3 if placement == "R1" else 0)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in reached)
    classifier = parts.student.get_submodule(parts.student.classifier_path)
    assert all(p.grad is None for p in classifier.parameters())


@PLACEMENTS
def test_cross_entropy_reaches_every_student_parameter_and_not_the_bridge(placement: str) -> None:
    parts = assemble(placement)
    images, labels = batch()
    parts.step(images, labels).losses["cross_entropy"].backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in parts.student.named_parameters() if p.grad is None] == []
    spoken = {name for name, p in parts.student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    silent = {name for name, _ in parts.student.named_parameters()} - spoken
    assert [name for name in silent if not name.endswith(CANCELLED)] == []
    assert all(p.grad is None for p in parts.distiller.parameters())


@PLACEMENTS
def test_the_teacher_never_changes(placement: str) -> None:
    parts = assemble(placement, ramp_epochs=0.0)
    before = copy.deepcopy(parts.teacher.state_dict())
    student_before = copy.deepcopy(parts.student.state_dict())
    optimizer = torch.optim.SGD(parts.task.parameters(), lr=0.1)
    parts.task.train()
    for seed in range(3):
        optimizer.zero_grad()
        sum(parts.step(*batch(seed=seed)).losses.values(), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert not any(module.training for module in parts.teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in parts.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in parts.teacher.state_dict().items())
    unchanged = [n for n, value in parts.student.state_dict().items() if torch.equal(value, student_before[n])]
    assert [name for name in unchanged if not name.endswith(CANCELLED)] == []
    trained = {id(p) for p in parts.task.parameters()}
    assert not trained & {id(p) for p in parts.teacher.parameters()}


def test_the_teacher_reads_the_images_in_its_own_normalisation() -> None:
    parts = assemble("R1")
    pixels = torch.rand(3, 3, SIZE, SIZE)
    own, students = ((0.2, 0.5, 0.4), (0.3, 0.2, 0.6)), ((0.5, 0.4, 0.6), (0.25, 0.5, 0.4))

    def normalised(values: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
        mean, std = (torch.tensor(value).reshape(1, 3, 1, 1) for value in values)
        return (pixels - mean) / std

    mean, std, student_mean, student_std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (*own, *students))
    parts.frozen.renormalise(student_std / std, (student_mean - mean) / std)
    result = parts.frozen(normalised(students))
    feature, logits = result.last, result.logits
    expected = copy.deepcopy(parts.teacher)(normalised(own))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert feature.shape == (3, WIDTH, 8, 8)
    classifier = cast(nn.Linear, parts.teacher.get_submodule("fc"))
    torch.testing.assert_close(classifier(feature.mean((2, 3))), logits)


@PLACEMENTS
def test_a_student_checkpoint_holds_the_student_and_its_branches_alone(placement: str) -> None:
    parts = assemble(placement)
    spec = StudentSpec(
        student="mobilenetv2",
        classes=tuple("abcde"),
        preprocessing=Preprocessing(image_size=SIZE, resize=SIZE, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)),
        branches=parts.spec,
        provenance={},
    )
    keys = set(parts.student.state_dict())
    assert keys == set(build_student(spec).state_dict())
    own = set(parts.distiller.state_dict())
    assert {"layers.last.teacher_mean", "layers.last.teacher_std"} <= own
    assert not {key for key in keys for name in own if key.endswith(name)}
    assert not [key for key in keys if "bridge" in key or "teacher" in key or "distiller" in key]
    assert set(parts.task.state_dict()) == {f"student.{key}" for key in keys} | {f"distiller.{key}" for key in own}


@PLACEMENTS
@pytest.mark.parametrize("training", [True, False])
def test_the_logits_come_from_the_uniform_mean_of_the_branches(placement: str, training: bool) -> None:
    parts = assemble(placement)
    student = parts.student.double().train(training)
    images = batch()[0].double()
    reference = copy.deepcopy(student)
    x = reference.get_submodule("conv1")(images)
    for group in cast(nn.ModuleList, reference.get_submodule("blocks")):
        x = group(x)
    if placement == "R2":
        x = reference.get_submodule("conv2")(x)
    total = torch.zeros(())
    for branch in cast(
        nn.ModuleList, reference.get_submodule(f"{branch_paths(reference, parts.spec)['last']}.branches")
    ):
        conv, norm = cast(nn.Sequential, branch)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        y = torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], x)
        variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        if not training:
            assert norm.running_var is not None
            assert norm.running_mean is not None
            variance, mean = norm.running_var, norm.running_mean
        columns = [v.reshape(1, -1, 1, 1) for v in (mean, (variance + norm.eps).sqrt(), norm.weight, norm.bias)]
        total = total + (y - columns[0]) / columns[1] * columns[2] + columns[3]
    feature = total / BRANCHES
    if placement == "R1":
        feature = feature.clamp(min=0)
    classifier = cast(nn.Linear, reference.get_submodule(reference.classifier_path))
    expected = feature.mean((2, 3)) @ classifier.weight.T + classifier.bias
    torch.testing.assert_close(student(images), expected, rtol=1e-9, atol=1e-9)


@PLACEMENTS
def test_the_loss_sees_each_branch_once_and_evaluation_leaves_nothing_behind(placement: str) -> None:
    parts = assemble(placement)
    images, labels = batch()
    seen: list[list[Tensor]] = []
    parts.distiller.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]["last"]))
    with torch.no_grad():
        parts.task.eval()
        parts.student(images)
        parts.task.train()
        for _ in range(2):
            parts.step(images, labels)
            x = parts.student.extract(images) if placement == "R2" else None
            assert len(seen[-1]) == BRANCHES
            assert all(not torch.equal(a, b) for a, b in zip(seen[-1], seen[-1][1:], strict=False))
            if x is not None:
                outputs = [branch(x) for branch in parts.parallel.branches]
                assert all(torch.equal(a, b) for a, b in zip(seen[-1], outputs, strict=True))
                parts.task._taps.take()


def test_the_cross_entropy_is_that_of_the_logits() -> None:
    parts = assemble("R1")
    images, labels = batch()
    result = parts.step(images, labels)
    log_probabilities = result.logits - result.logits.exp().sum(1, keepdim=True).log()
    expected = -log_probabilities[torch.arange(len(labels)), labels].mean()
    torch.testing.assert_close(result.losses["cross_entropy"], expected)
    assert set(result.losses) == {"cross_entropy", "diffusion"}


@pytest.mark.parametrize(("epoch", "share"), [(0.0, 0.0), (1.0, 0.25), (3.0, 0.75), (4.0, 1.0), (57.0, 1.0)])
def test_the_diffusion_weight_ramps_up_over_its_epochs(epoch: float, share: float) -> None:
    parts = assemble("R2")
    feature = teacher_features(4, seed=3)
    branches = [torch.from_numpy(pooled(teacher_features(4, seed=seed))).float() for seed in range(BRANCHES)]

    def loss(distiller: KDiffusion, at: float) -> float:
        return float(diffusion(distiller, branches, feature, context(at, (1, 2, 0))))

    full = loss(bare(), 0.0)
    assert full > 0.1
    assert loss(parts.distiller, epoch) == pytest.approx(2.5 * share * full, rel=1e-6)


def test_each_permutation_mode_reads_the_order_it_is_named_after() -> None:
    feature = teacher_features(4, seed=3)
    branches = [torch.from_numpy(pooled(teacher_features(4, seed=seed))).float() for seed in range(BRANCHES)]

    def losses(permutation: str) -> list[float]:
        distiller = bare(weight=2.5, permutation=permutation)
        orders = [(0, 1, 2), (1, 2, 0), (2, 1, 0)]
        return [float(diffusion(distiller, branches, feature, context(9, o))) for o in orders]

    shuffled, fixed, expected = losses("shuffle"), losses("fixed"), losses("expected")
    assert len(set(shuffled)) == 3
    assert fixed == [shuffled[0]] * 3
    assert len(set(expected)) == 1
    assert expected[0] not in shuffled


@PLACEMENTS
def test_the_branches_and_the_bridge_have_the_shapes_of_their_placement(placement: str) -> None:
    parts = assemble(placement)
    shapes = [tuple(cast(nn.Conv2d, cast(nn.Sequential, b)[0]).weight.shape) for b in parts.parallel.branches]
    if placement == "R1":
        assert shapes == [(1280, 160, 1, 1)] * BRANCHES
        assert tuple(cast(nn.Conv2d, cast(nn.Sequential, match(parts.distiller).bridge)[0]).weight.shape) == (
            64,
            1280,
            1,
            1,
        )
    else:
        assert shapes == [(WIDTH, 1280, 1, 1)] * BRANCHES
        assert list(parts.distiller.parameters()) == []
        assert cast(nn.Linear, parts.student.get_submodule("classifier.0")).in_features == WIDTH
    assert functional.softmax(parts.student(batch()[0]), 1).shape == (6, CLASSES)


@pytest.mark.parametrize(
    ("teacher", "pairs"),
    [
        ("resnet8", [("stage2", "stage1"), ("stage3", "stage2"), ("last", "stage3")]),
        ("resnet56", [("stage2", "stage1"), ("stage3", "stage2"), ("last", "stage3")]),
    ],
)
def test_stages_are_paired_from_the_deep_end(teacher: str, pairs: list[tuple[str, str]]) -> None:
    theirs = TEACHERS.build(teacher, num_classes=CLASSES, image_size=SIZE)
    student = STUDENTS.build("mobilenetv2", num_classes=CLASSES, image_size=SIZE)
    assert [(pair.student, pair.teacher) for pair in paired_stages(student, theirs, "multi")] == pairs
    assert [(pair.student, pair.teacher) for pair in paired_stages(student, theirs, "single")] == pairs[-1:]


@PLACEMENTS
def test_several_layers_are_distilled_at_once_and_fold_exactly(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = KDiffusionSettings.model_validate(
        {"placement": placement, "num_branches": BRANCHES, "layers": "multi", "weight": 3.0, "ramp_epochs": 0.0}
    )
    torch.manual_seed(3)
    teacher = TEACHERS.build("resnet8", num_classes=CLASSES, image_size=SIZE)
    student = STUDENTS.build("mobilenetv2", num_classes=CLASSES, image_size=SIZE)
    distiller = KDiffusion(settings=settings, student=student, teacher=teacher)
    spec = KDiffusion.branch_spec(settings, student, teacher)
    attach_branches(student, spec)
    layers = {
        name: cast(ParallelBranches, student.get_submodule(path)) for name, path in branch_paths(student, spec).items()
    }
    assert list(layers) == ["stage2", "stage3", "last"]
    task, frozen = DistillationTask(student, distiller, layers), FrozenTeacher(teacher, torch.device("cpu"), None)
    images, labels = batch()
    distiller.calibrate([frozen(images)])
    seen: dict[str, Tensor] = {}
    measured = distiller.distance

    def observed(branches: Tensor, target: Tensor, order: Tensor | None) -> Tensor:
        name = list(layers)[len(seen)]
        seen[name] = measured(branches, target, order)
        return seen[name]

    monkeypatch.setattr(distiller, "distance", observed)
    result = task(images, frozen(images), context(labels=labels))
    mean = sum(seen.values(), torch.zeros(())) / 3
    torch.testing.assert_close(result.losses["diffusion"], 3.0 * mean)
    result.losses["diffusion"].backward()
    for parallel in layers.values():
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parallel.branches.parameters())
    # The folded student is loaded from a checkpoint, without the taps of training.
    trained = STUDENTS.build("mobilenetv2", num_classes=CLASSES, image_size=SIZE)
    attach_branches(trained, spec)
    trained.load_state_dict(student.state_dict())
    fused = fuse_student(trained.double().eval())
    with torch.no_grad():
        x = images.double()
        assert relative_difference(fused.module(x), trained(x)) <= 1e-12
    plain = STUDENTS.build("mobilenetv2", num_classes=CLASSES, image_size=SIZE)
    weights = {name: value.shape for name, value in plain.state_dict().items() if value.dim() > 1}
    assert {name: value.shape for name, value in fused.module.state_dict().items() if value.dim() > 1} == weights


def raw_branches(count: int = 4) -> list[Tensor]:
    return [torch.from_numpy(pooled(teacher_features(count, seed=seed))).float() for seed in range(BRANCHES)]


CHOICES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "schedule": ({"schedule": "linear"}, {}),
    "weights": ({"step_weights": "inverse_v2"}, {"step_weights": "inverse_v2"}),
    "kl": ({"step_weights": "kl", "sigma": 0.7, "kl_limit": 4.5}, {"step_weights": "kl"}),
    "truncated": ({"backpropagation": "truncated"}, {"backpropagation": "truncated"}),
    "marginal": ({"trajectory": "marginal"}, {}),
    "own": ({"trajectory": "marginal", "start": "own_branch"}, {"start": "own_branch"}),
    "teacher": ({"trajectory": "marginal", "start": "teacher"}, {"start": "teacher"}),
    "attached": ({"trajectory": "marginal", "noise": "first_branch_attached"}, {"noise": "first_branch_attached"}),
    "step": ({"trajectory": "marginal", "noise": "step_branch"}, {"noise": "step_branch"}),
    "gaussian": (
        {"trajectory": "marginal", "noise": "gaussian", "sigma": 0.7},
        {"noise": "gaussian", "sigma": 0.7},
    ),
    "sampled": ({"trajectory": "marginal", "target": "sampled"}, {"target": "sampled"}),
}


@pytest.mark.parametrize("choice", sorted(CHOICES))
def test_every_choice_of_the_recipe_reaches_the_loss(choice: str) -> None:
    changes, options = CHOICES[choice]
    feature, branches = teacher_features(4, seed=3), [branch.requires_grad_() for branch in raw_branches()]
    steps = BRANCHES - (changes.get("start") == "own_branch")
    schedule = SCHEDULES[str(changes.get("schedule", "cosine"))](steps)
    weights = (
        step_weights_of(schedule, cast(StepWeights, options["step_weights"]), sigma=0.7, limit=4.5)
        if "step_weights" in options
        else None
    )
    reading = MarginalOptions(**{k: v for k, v in options.items() if k in MarginalOptions.__dataclass_fields__})  # type: ignore[arg-type]
    torch.manual_seed(1)
    expected = reverse_process_loss(
        branches,
        torch.from_numpy(pooled(feature)).float(),
        schedule,
        ORDER,
        cast(Trajectory, changes.get("trajectory", "shared_noise")),
        step_weights=weights,
        backpropagation=cast(Backpropagation, options.get("backpropagation", "full")),
        marginal=reading,
    )

    def found(**changed: object) -> tuple[Tensor, Tensor]:
        distiller = bare(**changed)
        torch.manual_seed(1)
        loss = diffusion(distiller, branches, feature, context())
        return loss, torch.cat(torch.autograd.grad(loss, branches, allow_unused=True, materialize_grads=True))

    loss, gradient = found(**changes)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(expected, branches, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(gradient, torch.cat(wanted), rtol=1e-4, atol=1e-7)
    assert (gradient - found()[1]).norm() > 0.01 * gradient.norm()


def test_an_order_holds_for_a_layer_an_iteration_or_a_sample() -> None:
    orders = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0]])
    step = replace(context(labels=torch.zeros(500, dtype=torch.int64)), orders=orders)

    def drawn(layer: int, **changes: object) -> Tensor:
        torch.manual_seed(4)
        order = bare(**changes).order(step, layer)
        assert order is not None
        return order

    assert [drawn(layer).tolist() for layer in range(3)] == orders.tolist()
    assert [drawn(layer, shuffle_per="iteration").tolist() for layer in range(3)] == [[0, 1, 2]] * 3
    distiller = bare(shuffle_per="sample")
    torch.manual_seed(4)
    first, second = (cast(Tensor, distiller.order(step, layer)) for layer in range(2))
    assert not torch.equal(first, second)
    # Each of the six orders of three branches comes as often as any other: 83 times, deviation 8.
    counts = Counter(map(tuple, first.tolist()))
    assert set(counts) == set(itertools.permutations(range(3)))
    assert min(counts.values()) > 45
    assert max(counts.values()) < 120
    torch.manual_seed(4)
    assert torch.equal(first, cast(Tensor, distiller.order(step, 0)))


def test_with_an_order_for_each_sample_the_loss_is_the_mean_of_theirs() -> None:
    distiller = bare(shuffle_per="sample")
    feature, branches = teacher_features(4, seed=3), raw_branches()
    step = context(labels=torch.zeros(4, dtype=torch.int64))
    torch.manual_seed(6)
    orders = cast(Tensor, distiller.order(step, 0)).tolist()
    torch.manual_seed(6)
    loss = diffusion(distiller, branches, feature, step)
    alone = bare()
    losses = [
        diffusion(alone, [b[n : n + 1] for b in branches], feature[n : n + 1], context(order=tuple(orders[n])))
        for n in range(4)
    ]
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert len({tuple(order) for order in orders}) > 1


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "expected marginal": (
        {"permutation": "expected", "trajectory": "marginal"},
        "permutation 'expected' has a closed form for trajectory 'shared_noise' only",
    ),
    "expected prediction": (
        {"permutation": "expected", "target_guide": 1.0, "guide_feature": "prediction"},
        "guide_feature 'prediction' needs one order of the branches, which permutation 'expected' does not have; set "
        "guide_feature to 'all', its mean over all orders",
    ),
    "own start alone": (
        {"num_branches": 1, "trajectory": "marginal", "start": "own_branch"},
        "start 'own_branch' needs one branch for the start and one for each step, but num_branches is 1; set it to "
        "2 or more",
    ),
    "fixed per sample": (
        {"permutation": "fixed", "shuffle_per": "sample"},
        "shuffle_per = 'sample' has no effect without permutation 'shuffle'",
    ),
    "start": ({"start": "teacher"}, "start = 'teacher' has no effect without trajectory 'marginal'"),
    "noise": ({"noise": "gaussian"}, "noise = 'gaussian' has no effect without trajectory 'marginal'"),
    "target": ({"target": "sampled"}, "target = 'sampled' has no effect without trajectory 'marginal'"),
    "limit": ({"kl_limit": 3.0}, "kl_limit = 3.0 has no effect without step_weights 'kl'"),
    "sigma": ({"sigma": 2.0}, "sigma = 2.0 has no effect without step_weights 'kl' or noise 'gaussian'"),
    "guide": ({"guide_feature": "all"}, "guide_feature = 'all' has no effect without a target_guide above 0"),
    "kd": ({"kd_temperature": 2.0}, "kd_temperature = 2.0 has no effect without a kd_weight above 0"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_contradictory_setting_is_refused_with_the_reason(case: str) -> None:
    changes, reason = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        load_recipe("digits", {"distiller": changes})
    assert reason[1:] in caught.value.message


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 4.0), (0.6, 2.5)])
def test_hintons_loss_may_stand_beside_the_cross_entropy(weight: float, temperature: float) -> None:
    parts = assemble("R1", kd_weight=weight, kd_temperature=temperature)
    images, labels = batch()
    result, taught = parts.step(images, labels), parts.frozen(images).logits
    assert ("kd" in result.losses) == (weight > 0)
    if weight > 0:
        p, q = (functional.softmax(x.double() / temperature, 1) for x in (taught, result.logits))
        divergence = (p * (p / q).log()).sum(1).mean()
        torch.testing.assert_close(
            result.losses["kd"].double(), weight * temperature**2 * divergence, rtol=1e-5, atol=0
        )


def guided(distiller: KDiffusion, branches: list[Tensor], taps: Tapped, epoch: float = 99.0) -> Tensor:
    return cast(Tensor, distiller(taps, {"last": branches}, taps, context(epoch))["guide"])


@pytest.mark.parametrize("guide_feature", ["mean", "prediction", "all"])
@pytest.mark.parametrize("teacher_normalisation", ["standardised", "raw"])
@pytest.mark.parametrize("teacher_feature", ["post_activation", "pre_activation"])
def test_the_guide_is_the_distance_behind_the_teachers_classifier(
    guide_feature: str, teacher_normalisation: str, teacher_feature: str
) -> None:
    distiller = bare(
        ramp_epochs=4.0,
        target_guide=0.3,
        guide_feature=guide_feature,
        teacher_normalisation=teacher_normalisation,
        teacher_feature=teacher_feature,
    )
    taps = taught()
    distiller.calibrate([taps])
    source = (taps.features if teacher_feature == "post_activation" else taps.preactivations)["stage3"]
    x0 = torch.from_numpy(pooled(source))
    generator = torch.Generator().manual_seed(3)
    branches = [0.8 * torch.randn(6, WIDTH, 2, 2, generator=generator) for _ in range(BRANCHES)]
    scale, shift = torch.ones(1, WIDTH, 1, 1).double(), torch.zeros(1, WIDTH, 1, 1).double()
    if teacher_normalisation == "standardised":
        # A channel that is zero on these images keeps its scale.
        scale, shift = x0.std((0, 2, 3), keepdim=True).clamp(min=1e-3), x0.mean((0, 2, 3), keepdim=True)
    chosen = {"mean": [sum(branches, torch.zeros(())) / BRANCHES], "prediction": [branches[ORDER[0]]], "all": branches}
    classifier = cast(nn.Linear, networks()[1].get_submodule("fc"))

    def logits(feature: Tensor) -> Tensor:
        return feature.clamp(min=0).mean((2, 3)) @ classifier.weight.double().T + classifier.bias.double()

    distances = [(logits(x0) - logits(z.double() * scale + shift)).square().mean() for z in chosen[guide_feature]]
    expected = 0.3 * sum(distances) / len(distances)
    torch.testing.assert_close(guided(distiller, branches, taps).double(), expected, rtol=1e-5, atol=0)
    # The ramp is that of the method's own loss: a quarter of it is done.
    torch.testing.assert_close(guided(distiller, branches, taps, 1.0).double(), expected / 4, rtol=1e-5, atol=0)


@PLACEMENTS
@pytest.mark.parametrize("teacher_feature", ["post_activation", "pre_activation"])
def test_the_guide_is_zero_where_the_branches_are_the_teacher(placement: str, teacher_feature: str) -> None:
    distiller, taps = bare(placement, target_guide=0.5, teacher_feature=teacher_feature).eval(), taught()
    distiller.calibrate([taps])
    source = (taps.features if teacher_feature == "post_activation" else taps.preactivations)["stage3"]
    layer = match(distiller)
    target = (torch.from_numpy(pooled(source)).float() - layer.teacher_mean) / layer.teacher_std
    exact = hosts_of(target, layer)
    assert guided(distiller, [exact] * BRANCHES, taps).item() < 1e-8
    assert guided(distiller, [hosts_of(target + 0.1, layer)] * BRANCHES, taps).item() > 1e-4


@pytest.mark.parametrize("layers", ["single", "multi"])
def test_the_guide_trains_the_branches_and_not_the_teacher(layers: str) -> None:
    torch.manual_seed(8)
    settings = KDiffusionSettings.model_validate({"num_branches": 3, "layers": layers, "target_guide": 0.7})
    fresh = networks()[0]
    teacher = TEACHERS.build("resnet8", num_classes=CLASSES, image_size=SIZE)
    student = STUDENTS.build("mobilenetv2", num_classes=CLASSES, image_size=SIZE)
    frozen = FrozenTeacher(teacher, torch.device("cpu"), None)
    distiller = KDiffusion(settings=settings, student=student, teacher=teacher)
    spec = KDiffusion.branch_spec(settings, student, teacher)
    attach_branches(student, spec)
    paths = branch_paths(student, spec)
    found = {name: cast(ParallelBranches, student.get_submodule(path)) for name, path in paths.items()}
    task = DistillationTask(student, distiller, found)
    images, labels = batch()
    distiller.calibrate([frozen(images)])
    before = copy.deepcopy(teacher.state_dict())
    task(images, frozen(images), context(labels=labels)).losses["guide"].backward()
    # Of several pairs the deepest alone is guided.
    reached = [n for n, parallel in found.items() if parallel.branches[0][0].weight.grad is not None]  # type: ignore[index]
    assert reached[-1] == "last"
    assert {id(p) for p in distiller.parameters()} == {id(p) for m in distiller.layers.values() for p in m.parameters()}
    bridges = [name for name, p in distiller.layers.named_parameters() if p.grad is not None]
    assert {name.split(".")[0] for name in bridges} == {"last"}
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    unguided = KDiffusion(settings=settings.model_copy(update={"target_guide": 0.0}), student=fresh, teacher=teacher)
    assert distiller.state_dict().keys() == unguided.state_dict().keys()


def test_a_teacher_without_a_last_relu_is_pooled_as_it_pools_itself() -> None:
    torch.manual_seed(2)
    teacher = TEACHERS.build("wrn40_2", num_classes=CLASSES, image_size=SIZE)
    hostile(teacher, 3)
    teacher.eval()
    guide, images = TargetGuide(teacher), batch(3)[0]
    norm = cast(nn.BatchNorm2d, teacher.get_submodule("bn1"))
    with torch.no_grad():
        # Statistics of these very features, so that negative ones pass the pooling's own ReLU.
        variance, mean = torch.var_mean(teacher.tapped(images).last, (0, 2, 3))
        cast(Tensor, norm.running_mean).copy_(mean - variance.sqrt())
        cast(Tensor, norm.running_var).copy_(variance)
    with torch.no_grad():
        taps = teacher.tapped(images)
        with pytest.raises(
            ValueError,
            match=r"^call calibrate\(\) before distance\(\): it finds out whether the last stage ends with a ReLU$",
        ):
            guide.distance(taps.last[None], taps.last)
        guide.calibrate([taps], "post_activation")
        other = teacher.tapped(images.flip(0))
        # At its own resolution the guide's distance is that of the logits.
        expected = (taps.logits - other.logits).square().mean()
        torch.testing.assert_close(guide.distance(other.last[None], taps.last), expected, rtol=1e-4, atol=0)
        with pytest.raises(ConfigError, match="does not end with a ReLU"):
            guide.calibrate([taps], "pre_activation")


def test_a_classifier_that_reads_more_than_averages_is_refused_before_training() -> None:
    with torch.device("meta"):
        teacher = TEACHERS.build("vgg13", num_classes=2, image_size=128)
    with pytest.raises(
        ConfigError, match="reads one value for each channel, but this one reads 25088 values of 512 channels"
    ):
        TargetGuide(teacher)


def test_the_loss_never_waits_for_the_device() -> None:
    # Tensors of the meta device have no values: reading one fails.
    distiller = bare("R1").to("meta")
    branches = [torch.empty(4, 1280, 2, 2, device="meta", requires_grad=True) for _ in range(BRANCHES)]
    step = StepContext(
        **{name: getattr(context(), name).to("meta") for name in ("epoch", "orders", "labels", "samples")}
    )
    loss = diffusion(distiller, branches, torch.empty(4, WIDTH, 8, 8, device="meta"), step)
    assert [g.shape for g in torch.autograd.grad(loss, branches)] == [branch.shape for branch in branches]
