import copy
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from kdexport.checkpoint import load_student, open_checkpoint
from kdexport.errors import DataError
from kdexport.students import STUDENTS, Tapped
from tests.training.small_runs import tiny_recipe
from training.distillers.crd import CRD, ContrastMemory, NegativeSampler
from training.distillers.distiller import StepContext
from training.distillers.settings import CRDSettings
from training.runs.handover import Origin
from training.teachers import TEACHERS
from training.train import train_student, train_teacher

Array = NDArray[np.float64]
#: 13 images of classes of unlike sizes, one of them empty and one of a single image.
LABELS = torch.tensor([3, 0, 0, 4, 0, 3, 1, 0, 4, 0, 3, 0, 4])
DIMENSION, TEMPERATURE, MOMENTUM, WEIGHT = 6, 0.23, 0.3, 0.625
ORIGIN = Origin(dataset_sha256="d" * 64, teacher_sha256="e" * 64)


def distiller(labels: Tensor = LABELS, **changes: object) -> CRD:
    settings = {
        "dimension": DIMENSION,
        "negatives": 5,
        "temperature": TEMPERATURE,
        "momentum": MOMENTUM,
        "weight": WEIGHT,
        **changes,
    }
    torch.manual_seed(5)
    method = CRD(
        settings=CRDSettings.model_validate(settings),
        student=STUDENTS.build("mobilenetv2", num_classes=5, image_size=16),
        teacher=TEACHERS.build("resnet8", num_classes=5, image_size=16),
    )
    method.prepare(labels)
    return method


def tapped(channels: int, count: int, seed: int) -> Tapped:
    """Pooled vectors with different means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 4, count, dtype=torch.float64)[:, None]
    pooled = torch.randn(count, channels, dtype=torch.float64, generator=generator) * scale + 0.4
    return Tapped(features={}, preactivations={}, pooled=pooled, logits=pooled)


def student_outputs(count: int, seed: int) -> Tapped:
    return tapped(1280, count, seed)


def teacher_outputs(count: int, seed: int) -> Tapped:
    return tapped(64, count, seed + 100)


def context(samples: list[int], labels: Tensor = LABELS, epoch: float = 9.0) -> StepContext:
    chosen = torch.tensor(samples)
    orders = torch.zeros(0, 1, dtype=torch.int64)
    return StepContext(epoch=torch.tensor(epoch), orders=orders, labels=labels[chosen], samples=chosen)


class Recorder:
    """The negatives that were drawn, one (B,K) a step."""

    def __init__(self, method: CRD) -> None:
        self.drawn: list[list[list[int]]] = []
        method.memory.others.register_forward_hook(lambda _, __, chosen: self.drawn.append(chosen.tolist()))


@dataclass
class Reference:
    """The published algorithm in float64, an image and a negative at a time."""

    student_bank: Array
    teacher_bank: Array
    student_weight: Array
    student_bias: Array
    teacher_weight: Array
    teacher_bias: Array
    normalisers: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, method: CRD) -> "Reference":
        tensors = (
            method.memory.student,
            method.memory.teacher,
            *method.student_projection.parameters(),
            *method.teacher_projection.parameters(),
        )
        arrays: list[Array] = [tensor.detach().double().numpy().copy() for tensor in tensors]
        return cls(arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], arrays[5])

    def embed(self, student: Tapped, teacher: Tapped) -> tuple[list[Array], list[Array]]:
        own = [self.student_weight @ row + self.student_bias for row in student.pooled.double().numpy()]
        given = [self.teacher_weight @ row + self.teacher_bias for row in teacher.pooled.double().numpy()]
        return [v / math.sqrt(v @ v) for v in own], [v / math.sqrt(v @ v) for v in given]

    def loss(self, student: Tapped, teacher: Tapped, samples: list[int], negatives: list[list[int]]) -> float:
        own, given = self.embed(student, teacher)
        n, total = len(self.student_bank), 0.0
        both = ((own, self.teacher_bank), (given, self.student_bank))
        raw = [
            [
                [math.exp(v @ bank[j] / TEMPERATURE) for j in (i, *others)]
                for v, i, others in zip(vs, samples, negatives, strict=True)
            ]
            for vs, bank in both
        ]
        if not self.normalisers:
            self.normalisers = [n * sum(map(sum, rows)) / sum(map(len, rows)) for rows in raw]
        for rows, z in zip(raw, self.normalisers, strict=True):
            for positive, *rest in rows:
                noise = len(rest) / n
                total -= math.log(positive / z / (positive / z + noise + 1e-7))
                total -= sum(math.log(noise / (value / z + noise + 1e-7)) for value in rest)
        return total / len(samples)

    def remember(self, student: Tapped, teacher: Tapped, samples: list[int]) -> None:
        own, given = self.embed(student, teacher)
        for bank, vectors in ((self.student_bank, own), (self.teacher_bank, given)):
            for i, v in zip(samples, vectors, strict=True):
                mixed = MOMENTUM * bank[i] + (1 - MOMENTUM) * v
                bank[i] = mixed / math.sqrt(mixed @ mixed)


#: The last batch of an epoch of 13 images is smaller; images come again in the second epoch.
EPOCHS = ([7, 3, 0, 12], [6, 1, 9, 5], [2, 4, 8, 10], [11], [4, 6, 12, 0], [3, 5, 11, 7])


@pytest.mark.parametrize("negatives", [5, 1, 4])
def test_losses_and_memories_are_those_of_the_published_algorithm(negatives: int) -> None:
    method = distiller(negatives=negatives).double()
    recorder, reference = Recorder(method), Reference.of(method)
    for seed, samples in enumerate(EPOCHS):
        student, teacher = student_outputs(len(samples), seed), teacher_outputs(len(samples), seed)
        (name, loss), *rest = method(student, {}, teacher, context(samples)).items()
        assert (name, rest) == ("crd", [])
        assert len(recorder.drawn[-1][0]) == negatives
        assert loss.item() == pytest.approx(
            WEIGHT * reference.loss(student, teacher, samples, recorder.drawn[-1]), rel=1e-12
        )
        reference.remember(student, teacher, samples)
        for bank, expected in (
            (method.memory.student, reference.student_bank),
            (method.memory.teacher, reference.teacher_bank),
        ):
            np.testing.assert_allclose(bank.numpy(), expected, rtol=0, atol=1e-13)
        np.testing.assert_allclose(method.memory.normaliser.numpy(), reference.normalisers, rtol=1e-12)


@pytest.mark.parametrize("first", [True, False])
def test_gradients_are_those_against_the_memory_before_its_update(first: bool) -> None:
    method = distiller().double()
    recorder, reference = Recorder(method), Reference.of(method)
    samples = EPOCHS[0]
    student, teacher = student_outputs(4, 0), teacher_outputs(4, 0)
    if not first:
        method(student, {}, teacher, context(samples))
        reference.loss(student, teacher, samples, recorder.drawn[-1])
        reference.remember(student, teacher, samples)
        student, teacher = student_outputs(4, 1), teacher_outputs(4, 1)
    method(student, {}, teacher, context(samples))["crd"].backward()
    reference.loss(student, teacher, samples, recorder.drawn[-1])
    step = 1e-6
    for layer, array in (
        (method.student_projection, reference.student_weight),
        (method.teacher_projection, reference.teacher_weight),
    ):
        for at in ((0, 0), (2, 31), (5, 63)):
            values = []
            for sign in (1, -1):
                array[at] += sign * step
                values.append(WEIGHT * reference.loss(student, teacher, samples, recorder.drawn[-1]))
                array[at] -= sign * step
            assert layer.weight.grad is not None
            numeric = (values[0] - values[1]) / (2 * step)
            assert abs(numeric) > 1e-5
            assert layer.weight.grad[at].item() == pytest.approx(numeric, rel=1e-5)


def test_the_weight_is_reached_by_its_ramp() -> None:
    method = distiller(ramp_epochs=8.0, weight=3.0)
    before = copy.deepcopy(method)
    losses = []
    for fresh, epoch in ((method, 2.0), (before, 8.0)):
        torch.manual_seed(0)
        losses.append(
            fresh(student_outputs(3, 0), {}, teacher_outputs(3, 0), context([3, 1, 6], epoch=epoch))["crd"].item()
        )
    assert losses[0] == pytest.approx(losses[1] / 4, rel=1e-6)


def draw(others: NegativeSampler, samples: Tensor, times: int) -> Tensor:
    """Indicators (times, B, n) of what was drawn."""
    torch.manual_seed(11)
    drawn = torch.zeros(times, len(samples), len(others.labels))
    for taken in drawn:
        taken.scatter_add_(1, others(samples), torch.ones(len(samples), others.count))
    return drawn


@pytest.mark.parametrize("count", [1, 4, 7, 1000])
def test_negatives_are_distinct_images_of_other_classes(count: int) -> None:
    others = NegativeSampler(LABELS, count)
    # Class 0 has six of the thirteen images.
    assert others.count == min(count, 7)
    drawn = draw(others, torch.arange(13), 200)
    assert drawn.max() == 1
    assert (drawn.sum(2) == others.count).all()
    same = LABELS[:, None] == LABELS
    assert (drawn[:, same] == 0).all()
    # All images of other classes are drawn, for classes of every size.
    assert (drawn.sum(0)[~same] > 0).all()


def within(observed: Tensor, expected: Tensor, times: int) -> None:
    """Shares of ``times`` trials lie within five deviations of their probabilities."""
    deviations = (observed - expected) / (expected * (1 - expected) / times).sqrt().clamp(min=1e-9)
    assert deviations.abs().max() < 5


def test_draws_are_uniform_in_an_image_and_independent_between_images() -> None:
    labels, count, times = torch.tensor([0, 1, 1, 2, 2, 2, 1]), 3, 3000
    samples = torch.tensor([0, 1, 3, 4])
    drawn = draw(NegativeSampler(labels, count), samples, times)
    allowed = (labels[samples][:, None] != labels).float()
    pool = allowed.sum(1, keepdim=True)
    share = allowed * count / pool
    within(drawn.mean(0), share, times)
    joint = torch.einsum("tai,tbj->abij", drawn, drawn) / times
    for a, b in itertools.product(range(4), repeat=2):
        if a == b:
            pairs = share[a][:, None] * allowed[a] * (count - 1) / (pool[a] - 1)
            pairs[torch.arange(7), torch.arange(7)] = share[a]
        else:
            pairs = share[a][:, None] * share[b]
        within(joint[a, b], pairs, times)


def test_the_negatives_of_an_image_do_not_depend_on_its_batch() -> None:
    others = NegativeSampler(LABELS, 4)
    drawn = []
    for samples in ([0, 7, 12, 3], [12, 5], [3]):
        torch.manual_seed(2)
        drawn.append(others(torch.tensor(samples)))
    assert torch.equal(drawn[0][2], drawn[1][0])
    assert torch.equal(drawn[0][3], drawn[2][0])


def test_a_data_set_of_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="needs at least 2 classes, but all 9 training images are of one"):
        distiller(torch.full((9,), 2))


def test_memories_begin_evenly_between_bounds_that_give_unit_length_on_average() -> None:
    memory = ContrastMemory(torch.arange(3000) % 2, dimension=48, negatives=9, temperature=0.1, momentum=0.5)
    for bank in (memory.student, memory.teacher):
        assert 0.2495 < bank.abs().max() <= 0.25
        assert bank.square().sum(1).mean().item() == pytest.approx(1, abs=0.02)
        assert abs(bank.mean().item()) < 0.002
    assert not torch.equal(memory.student, memory.teacher)


def test_low_precision_around_the_method_changes_no_bit_of_it() -> None:
    results = []
    for enabled in (False, True):
        method = distiller()
        student, teacher = (
            Tapped(features={}, preactivations={}, pooled=said.pooled.bfloat16(), logits=said.logits)
            for said in (student_outputs(4, 0), teacher_outputs(4, 0))
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = method(student, {}, teacher, context([7, 3, 0, 12]))["crd"]
        assert loss.dtype == method.memory.student.dtype == torch.float32
        results.append((loss.detach(), method.memory.state_dict()))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())


def test_evaluation_changes_no_memory() -> None:
    method = distiller().eval()
    before = copy.deepcopy(method.state_dict())
    method(student_outputs(4, 0), {}, teacher_outputs(4, 0), context([7, 3, 0, 12]))
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_an_embedding_opposite_to_its_memory_leaves_finite_numbers() -> None:
    memory = ContrastMemory(LABELS, dimension=DIMENSION, negatives=5, temperature=0.05, momentum=0.5)
    samples = torch.tensor([2, 9])
    memory.student.copy_(nn.functional.normalize(memory.student))
    for _ in range(2):
        opposite = -memory.student[samples].clone()
        loss = memory(opposite, opposite, samples)
        assert loss.isfinite()
        assert memory.student.isfinite().all()
    assert (memory.student[samples] == 0).all()


@pytest.mark.parametrize("dimension", [1, 2, 128])
def test_the_lowest_temperature_stays_in_single_precision(dimension: int) -> None:
    memory = ContrastMemory(LABELS, dimension=dimension, negatives=5, temperature=0.05, momentum=0.0)
    ones = nn.functional.normalize(torch.ones(3, dimension))
    extreme = math.sqrt(3 / dimension)
    # As far apart as first memories can be: all negatives alike, all positives opposite, then the reverse.
    for sign in (1, -1):
        memory.normaliser.zero_()
        for bank in (memory.student, memory.teacher):
            bank.fill_(sign * extreme)
            bank[:3] = -sign * extreme
        vectors = ones.clone().requires_grad_()
        loss = memory(vectors, vectors, torch.tensor([0, 1, 2]))
        loss.backward()
        assert loss.isfinite()
        assert vectors.grad is not None
        assert vectors.grad.isfinite().all()


def test_a_temperature_below_single_precision_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"greater than or equal to 0\.05"):
        CRDSettings(temperature=0.04)


def test_the_host_never_waits_for_a_value() -> None:
    memory = ContrastMemory(LABELS, dimension=DIMENSION, negatives=5, temperature=0.1, momentum=0.5).to("meta")
    # Tensors without values: to read one is an error.
    vectors = torch.empty(2, 4, DIMENSION, device="meta", requires_grad=True)
    loss = memory(*vectors, torch.empty(4, dtype=torch.int64, device="meta"))
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.item()


@pytest.fixture(scope="module")
def crd_recipe(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of the tiny recipe for CRD with few negatives, and a teacher."""
    out = tmp_path_factory.mktemp("teacher")
    train_teacher(tiny_recipe(tiny_images), out)
    return [
        f"teacher.checkpoint={out / 'model.safetensors'}",
        'distiller={name="crd", negatives=7, dimension=10, momentum=0.4}',
        "train.schedule=step",
        "train.milestones=[2]",
    ]


MEMORY_STATE = ("student", "teacher", "normaliser", "others.labels", "others.sizes", "others.firsts")


def test_a_run_resumed_after_any_epoch_ends_with_the_bits_of_an_uninterrupted_one(
    crd_recipe: list[str], tiny_images: Path, tmp_path: Path
) -> None:
    def trained(folder: str, epochs: int) -> dict[str, Tensor]:
        recipe = tiny_recipe(tiny_images, *crd_recipe, f"train.epochs={epochs}")
        train_student(recipe, tmp_path / folder, ORIGIN)
        return load_file(tmp_path / folder / "resume.safetensors")

    whole = trained("whole", 3)
    first = trained("parted", 1)
    trained("parted", 2)
    parted = trained("parted", 3)
    kept = {name for name in whole if name.startswith("task.distiller.memory.")}
    assert kept == {f"task.distiller.memory.{name}" for name in MEMORY_STATE}
    assert (whole["task.distiller.memory.normaliser"] > 0).all()
    assert torch.equal(whole["task.distiller.memory.normaliser"], first["task.distiller.memory.normaliser"])
    assert not torch.equal(whole["task.distiller.memory.student"], first["task.distiller.memory.student"])
    assert whole.keys() == parted.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, parted[name])] == []
    written = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parted")]
    timeless = [[{**json.loads(line), "images_per_s": 0.0} for line in lines] for lines in written]
    assert timeless[0] == timeless[1]
    assert "loss/crd" in timeless[0][0]
    # The checkpoint of the student holds nothing of the method.
    exported = load_file(tmp_path / "whole" / "student" / "model.safetensors")
    student = load_student(open_checkpoint(tmp_path / "whole" / "student"))
    assert exported.keys() == student.state_dict().keys()
    assert all(torch.equal(value, whole[f"task.student.{name}"]) for name, value in exported.items())
