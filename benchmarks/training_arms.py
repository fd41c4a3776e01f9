"""The training loops to time, on noise with an untrained teacher: a plain loop as in public code, and ours."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as transforms
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kdexport.checkpoint import save_tensors
from kdexport.data.datasets import ImageSet
from kdexport.students import STUDENTS
from training.data import EvaluationBatches, training_batches
from training.devices import compiled
from training.recipe import Recipe, load_recipe
from training.runs.captured import CapturedSteps
from training.runs.loop import Run, captured_steps, train_epoch
from training.runs.optimiser import optimiser
from training.runs.progress import EpochProgress
from training.runs.step import OptimisationStep
from training.teachers import TEACHERS
from training.train import make_accelerator, prepare_distillation

CLASSES, SIZE, WORKERS = 100, 32, 2
#: Runs some steps and returns the seconds of one step.
Arm = Callable[[], float]
Clock = Callable[[], float]


def recipe_of(method: str, batch: int, weights: Path) -> Recipe:
    """The pair to train: teacher resnet56, student mobilenetv2."""
    changes = {
        "teacher": {"checkpoint": str(weights)},
        "distiller": {"name": method},
        "train": {"batch_size": batch, "learning_rate": 1e-3, "nesterov": True},
    }
    return load_recipe("cifar100", changes)


def noise(count: int) -> ImageSet:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    names = tuple(str(index) for index in range(CLASSES))
    return ImageSet(classes=names, labels=rng.integers(0, CLASSES, count), pixels=pixels, files=())


def teacher_weights(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "teacher.safetensors"
    save_tensors(path, TEACHERS.build("resnet56", num_classes=CLASSES, image_size=SIZE).state_dict())
    return path


class Arrays(Dataset[tuple[Tensor, int]]):
    """A data set of small images as in public code: arrays become PIL images, which are transformed one by one."""

    def __init__(self, images: ImageSet, recipe: Recipe) -> None:
        self.images = images
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(SIZE, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(recipe.data.mean, recipe.data.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        assert self.images.pixels is not None
        return self.transform(Image.fromarray(self.images.pixels[index])), int(self.images.labels[index])


def cpu_seconds() -> float:
    """CPU time of this process and its children, including running ones."""
    times = os.times()
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return times.user + times.system + times.children_user + times.children_system + ticks / os.sysconf("SC_CLK_TCK")


def plain_reference(images: ImageSet, recipe: Recipe, clock: Clock) -> Arm:
    """Supervised steps with a forward pass of the teacher: loader workers, NCHW, eager, the loss read at each step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(
        Arrays(images, recipe),
        batch_size=recipe.train.batch_size,
        shuffle=True,
        num_workers=WORKERS,
        drop_last=True,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    student = STUDENTS.build("mobilenetv2", num_classes=CLASSES, image_size=SIZE).to(device).train()
    teacher = TEACHERS.build("resnet56", num_classes=CLASSES, image_size=SIZE).to(device).eval()
    settings = recipe.train
    optimizer = torch.optim.SGD(student.parameters(), lr=settings.learning_rate, momentum=0.9, weight_decay=5e-4)

    def steps() -> Iterator[None]:
        running, correct = 0.0, 0
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            with torch.no_grad():
                teacher.tapped(x)
            logits = student(x)
            loss = nn.functional.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            running += loss.item()
            correct += int((logits.argmax(1) == y).sum().item())
            yield

    def epoch() -> float:
        moments = [clock() for _ in steps()]
        # Timed from the first step on, because workers fill their queues before it.
        return (moments[-1] - moments[0]) / (len(moments) - 1)

    return epoch


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """A run of our loop that writes nothing; ``captured`` are its steps as a CUDA graph, if it has them."""

    job: Run
    accelerator: Accelerator
    step: OptimisationStep
    progress: EpochProgress
    captured: CapturedSteps | None


def our_cell(images: ImageSet, recipe: Recipe) -> Cell:
    """The method of ``recipe`` on ``images``, with an evaluation on one batch."""
    accelerator = make_accelerator(recipe.train)
    settings, device = recipe.train, accelerator.device
    batches = training_batches(images, recipe.data, batch_size=settings.batch_size, seed=settings.seed, device=device)
    distillation = prepare_distillation(recipe, images, batches, device)
    job = Run(
        directory=Path(),
        title=recipe.distiller.name,
        settings=settings,
        branches=(distillation.layers, distillation.branches.num_branches if distillation.branches else 1),
        task=distillation.task,
        network=distillation.student,
        batches=batches,
        evaluation=list(EvaluationBatches(noise(10), recipe.data, device=device)),
        teach=distillation.frozen,
    )
    task, optimizer = accelerator.prepare(distillation.task, optimiser(distillation.task, settings))
    step = OptimisationStep(
        compiled(task, settings.compile, device), job.teach, optimizer, accelerator, clip_norm=settings.clip_norm
    )
    progress = EpochProgress(
        "", steps_per_epoch=batches.steps, epochs=1000, done_epochs=0, batch_size=settings.batch_size, quiet=True
    )
    return Cell(job, accelerator, step, progress, captured_steps(job, accelerator, step, 0, progress))


def our_loop(images: ImageSet, recipe: Recipe, clock: Clock) -> Arm:
    """Our loop with the method of ``recipe``, including its evaluation on one batch."""
    cell = our_cell(images, recipe)
    epochs = iter(range(1000))

    def epoch() -> float:
        started = clock()
        train_epoch(cell.job, cell.accelerator, cell.step, next(epochs), cell.progress, (), cell.captured)
        return (clock() - started) / cell.job.batches.steps

    return epoch
