"""A student, a teacher and any method between them, small enough for a step to take milliseconds."""

from dataclasses import dataclass
from math import ceil
from typing import cast

import torch
from torch import Tensor, nn

from kdexport.reparam.blocks import BranchSpec, attach_branches, branch_paths
from kdexport.reparam.branches import ParallelBranches
from kdexport.students import STUDENTS, Classifier, Student, Tapped
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.distillers.settings import DistillerSettings, settings_model
from training.runs.task import DistillationTask, FrozenTeacher, StepResult
from training.teachers import TEACHERS, Teacher

CLASSES, SIZE, IMAGES, COUNT = 5, 16, 40, 6


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a training run; ``spec`` describes the branches of the student."""

    student: Student
    teacher: Teacher
    frozen: FrozenTeacher
    distiller: Distiller
    spec: BranchSpec | None
    task: DistillationTask

    def step(self, seed: int = 0, epoch: float = 50.25) -> StepResult:
        """One forward pass on the batch ``seed``; negatives and dropout are drawn from that seed too."""
        images, context = batch(seed, self.spec, epoch)
        torch.manual_seed(seed)
        return cast(StepResult, self.task(images, self.frozen(images), context))


#: The inputs of a distiller in one step.
DistillerInputs = tuple[Tapped, BranchFeatures, Tapped, StepContext]


def distiller_inputs(parts: Parts, seed: int = 0) -> DistillerInputs:
    """The inputs of the distiller in the step ``seed``, without a gradient."""
    calls: list[DistillerInputs] = []
    handle = parts.distiller.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    with torch.no_grad():
        parts.step(seed)
    handle.remove()
    return calls[0]


def settings_of(name: str, **changes: object) -> DistillerSettings:
    return settings_model(name).model_validate({"name": name, **changes})


def labels_of_all() -> Tensor:
    """The class of each of ``IMAGES`` training images; every class occurs."""
    return torch.arange(IMAGES) * 3 % CLASSES


def batch(seed: int, spec: BranchSpec | None = None, epoch: float = 50.25) -> tuple[Tensor, StepContext]:
    """``COUNT`` images (N,3,S,S) off centre, and the context of their step."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(COUNT, 3, SIZE, SIZE, generator=generator) * 1.4 + 0.3
    samples = torch.randperm(IMAGES, generator=generator)[:COUNT]
    layers, branches = (len(cast(tuple[str, ...], spec.layers)), spec.num_branches) if spec else (0, 1)
    orders = torch.rand(layers, branches, generator=generator).argsort(1)
    labels = labels_of_all()[samples]
    return images, StepContext(epoch=torch.tensor(epoch), orders=orders, labels=labels, samples=samples)


def hostile(module: nn.Module, seed: int) -> None:
    """Set statistics and scales of every batch norm to values unlike those of a fresh one."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            ranges = ((norm.weight, 0.5, 2), (norm.bias, -0.7, 0.9), (norm.running_mean, -0.6, 0.4))
            for tensor, low, high in (*ranges, (norm.running_var, 0.3, 3)):
                cast(Tensor, tensor).data.uniform_(low, high, generator=generator)


def assemble(name: str, *, student: str = "mobilenetv2", seed: int = 8, **changes: object) -> Parts:
    """Method ``name`` from resnet8 to ``student``, as ``training.train`` puts them together."""
    settings = settings_of(name, **changes)
    # The teacher is one and the same for every seed.
    torch.manual_seed(4)
    teacher = TEACHERS.build("resnet8", num_classes=CLASSES, image_size=SIZE)
    torch.manual_seed(seed)
    network = STUDENTS.build(student, num_classes=CLASSES, image_size=SIZE)
    hostile(teacher, 1)
    frozen = FrozenTeacher(teacher, torch.device("cpu"), None)
    distiller = DISTILLERS.build(name, settings=settings, student=network, teacher=teacher)
    spec = type(distiller).branch_spec(settings, network, teacher)
    layers = {}
    if spec is not None:
        attach_branches(network, spec)
        paths = branch_paths(network, spec)
        layers = {tap: cast(ParallelBranches, network.get_submodule(path)) for tap, path in paths.items()}
    distiller.prepare(labels_of_all())
    distiller.calibrate(frozen(batch(other)[0]) for other in (91, 92))
    for index, module in enumerate((network, distiller)):
        hostile(module, seed + index)
    task = DistillationTask(network, distiller, layers)
    return Parts(student=network, teacher=teacher, frozen=frozen, distiller=distiller, spec=spec, task=task)


def random_tapped(network: Classifier, count: int, seed: int, *, classes: int = CLASSES) -> Tapped:
    """Random float64 outputs with the shapes of ``network``, which is not run; the spread differs between channels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(channels: int, stride: int) -> Tensor:
        side = ceil(network.image_size / stride)
        spread = torch.linspace(0.2, 3, channels, dtype=torch.float64).reshape(1, -1, 1, 1)
        values = torch.randn(count, channels, side, side, generator=generator, dtype=torch.float64)
        return values * spread + spread.flip(1) - 1.3

    preactivations = {tap.name: draw(tap.channels, tap.stride) for tap in network.taps}
    width = cast(nn.Linear, network.get_submodule(network.classifier_path)).in_features
    return Tapped(
        features={name: values.relu() for name, values in preactivations.items()},
        preactivations=preactivations,
        pooled=draw(width, network.image_size)[:, :, 0, 0],
        logits=draw(classes, network.image_size)[:, :, 0, 0] * 3,
    )
