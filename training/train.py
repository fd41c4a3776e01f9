"""The three jobs of ``python -m training``: train a teacher, distil a student, evaluate either.

One run from recipe to student: claims its folder, trains the teacher where it has no weights, then distils.

Refuses before hours of training what could not be folded after them.
"""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, cast

import torch
from accelerate import Accelerator, init_empty_weights

from kdexport.checkpoint import load_student as load_trained_student
from kdexport.checkpoint import open_checkpoint, save_tensors
from kdexport.core.digests import sha256_file
from kdexport.core.files import recover, write_file, write_text
from kdexport.data.datasets import ImageSet, dataset_digest, open_dataset
from kdexport.errors import BackendUnavailableError, CheckpointError
from kdexport.reparam.blocks import BranchSpec, attach_branches, branch_paths
from kdexport.reparam.branches import ParallelBranches
from kdexport.students import STUDENTS, Student
from training.data import Batches, EvaluationBatches, preprocessing_of, training_batches
from training.devices import LocalBuffers, check_batch_size, gathered
from training.distillers import DISTILLERS
from training.recipe import Recipe, TrainSettings
from training.runs.handover import Origin, hand_over, student_spec
from training.runs.loop import Metrics, Run, learning_rate, run, top1
from training.runs.record import claim, device_name, note_environment
from training.runs.task import DistillationTask, FrozenTeacher, SupervisedTask
from training.teachers import TEACHERS, Teacher
from training.teachers.teacher import load_teacher_weights

__all__ = ["Origin", "evaluate_student", "evaluate_teacher", "learning_rate", "train_student", "train_teacher"]

_CALIBRATION_BATCHES = 8

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}

Precision = Literal["no", "bf16", "fp16"]


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """CUDA where there is one, else the CPU; several processes under ``accelerate launch`` or ``torchrun``."""
    # Unless told, accelerate does not join the processes of torchrun on a machine without a GPU.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=_precision(settings.mixed_precision))
    accelerator.ddp_handler = LocalBuffers()
    check_batch_size(settings.batch_size, accelerator.num_processes)
    return accelerator


def _precision(asked: str) -> Precision:
    if asked == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    if asked == "fp16" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "mixed_precision = 'fp16' needs a CUDA device, and there is none.",
            remedy="Use 'no' or 'bf16', or run on a GPU machine.",
        )
    return "bf16" if asked == "bf16" else "fp16" if asked == "fp16" else "no"


def train_teacher(recipe: Recipe, directory: Path) -> Metrics:
    """Train the recipe's teacher with cross-entropy into ``directory``/model.safetensors; returns the last metrics."""
    settings = recipe.train.model_copy(
        update={"epochs": recipe.teacher.epochs, "learning_rate": recipe.teacher.learning_rate}
    )
    accelerator = make_accelerator(settings)
    train, test = open_dataset(recipe.data.spec(), "train"), open_dataset(recipe.data.spec(), "test")
    # The teacher is trained in the normalisation that it will be fed in.
    own = {"mean": recipe.teacher.mean or recipe.data.mean, "std": recipe.teacher.std or recipe.data.std}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=own)})
    torch.manual_seed(settings.seed)
    teacher = _build_teacher(recipe, train).to(accelerator.device)
    teacher.to(memory_format=torch.channels_last)
    job = Run(
        directory=directory,
        title=f"teacher {recipe.teacher.name}",
        settings=settings,
        branches=(0, 1),
        task=SupervisedTask(teacher),
        network=teacher,
        batches=_batches(train, recipe, accelerator),
        evaluation=EvaluationBatches(test, recipe.data, device=accelerator.device),
        teach=lambda _: None,
    )
    history = run(job, accelerator)
    if accelerator.is_main_process:
        described = {"teacher": recipe.teacher.name, "classes": list(train.classes), "metrics": history[-1]}
        write_text(directory / "teacher.json", json.dumps(described, indent=2))
        # The weights appear last: they say that the teacher is done.
        write_file(directory / "model.safetensors", lambda path: save_tensors(path, teacher.state_dict()))
    accelerator.wait_for_everyone()
    return history[-1]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lesson:
    """Networks and method, ready to train; ``observed`` (N,3,S,S) is the batch on which branches are compared."""

    student: Student
    frozen: FrozenTeacher
    branches: BranchSpec | None
    layers: int
    task: DistillationTask
    observed: torch.Tensor

    def diversity(self) -> Metrics:
        """How the branches differ now."""
        return self.task.diversity(self.observed, self.frozen(self.observed))


def train_student(recipe: Recipe, directory: Path, origin: Origin) -> Metrics:
    """Distil the recipe's student into ``directory``/student; returns the metrics of the last epoch."""
    accelerator = make_accelerator(recipe.train)
    train, test = open_dataset(recipe.data.spec(), "train"), open_dataset(recipe.data.spec(), "test")
    evaluation = EvaluationBatches(test, recipe.data, device=accelerator.device)
    batches = _batches(train, recipe, accelerator)
    lesson = prepare_lesson(recipe, train, batches, accelerator.device)
    teacher_top1 = top1(_logits_only(lesson.frozen), evaluation)

    def keep(name: str, metrics: Metrics) -> None:
        spec = student_spec(recipe, train, lesson.branches, metrics, origin)
        hand_over(directory / name, lesson.student, spec)

    def keep_best(metrics: Metrics) -> None:
        keep("best", {**metrics, "teacher_top1": teacher_top1, "best_epoch_top1": metrics["top1"]})

    job = Run(
        directory=directory,
        title=f"student {recipe.student.name}",
        settings=recipe.train,
        branches=(lesson.layers, lesson.branches.num_branches if lesson.branches else 1),
        task=lesson.task,
        network=lesson.student,
        batches=batches,
        evaluation=evaluation,
        teach=lesson.frozen,
        diversity=lesson.diversity if lesson.branches else None,
        keep_best=keep_best,
        teacher_top1=teacher_top1,
    )
    if accelerator.is_main_process:
        recover(directory / "best")
    history = run(job, accelerator)
    best = max(epoch["top1"] for epoch in history)
    metrics = {**history[-1], "teacher_top1": teacher_top1, "best_epoch_top1": best}
    if accelerator.is_main_process:
        keep("student", metrics)
    return metrics


def prepare_lesson(recipe: Recipe, train: ImageSet, batches: Batches, device: torch.device) -> Lesson:
    """Build the networks and the method of ``recipe``, with the seed of its run, and calibrate the method."""
    teacher = _build_teacher(recipe, train)
    load_teacher_weights(teacher, Path(recipe.teacher.checkpoint))
    torch.manual_seed(recipe.train.seed)
    student = STUDENTS.build(recipe.student.name, num_classes=len(train.classes), image_size=recipe.data.image_size)
    DISTILLERS.check(recipe.distiller.name)
    frozen = _freeze(teacher, recipe, device)
    distiller = DISTILLERS.build(recipe.distiller.name, settings=recipe.distiller, student=student, teacher=teacher)
    branches = type(distiller).branch_spec(recipe.distiller, student, teacher)
    layers = _attach(student, branches)
    distiller.prepare(torch.from_numpy(train.labels))
    calibration = [gathered(batch.images) for batch in islice(batches.epoch(0), _CALIBRATION_BATCHES)]
    distiller.calibrate(map(frozen, calibration))
    task = DistillationTask(student, distiller, layers).to(device)
    task.to(memory_format=torch.channels_last)
    return Lesson(
        student=student, frozen=frozen, branches=branches, layers=len(layers), task=task, observed=calibration[0]
    )


def evaluate_teacher(recipe: Recipe) -> float:
    """Top-1 of the recipe's teacher checkpoint on the test split, in full precision."""
    device = make_accelerator(recipe.train.model_copy(update={"mixed_precision": "no"})).device
    test = open_dataset(recipe.data.spec(), "test")
    teacher = _build_teacher(recipe, test)
    load_teacher_weights(teacher, Path(recipe.teacher.checkpoint))
    exact = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"mixed_precision": "no", "teacher_precision": "no"})}
    )
    return top1(_logits_only(_freeze(teacher, exact, device)), EvaluationBatches(test, recipe.data, device=device))


def evaluate_student(recipe: Recipe, checkpoint: Path) -> float:
    """Top-1 of a student checkpoint on the test split of the recipe's data, in full precision."""
    device = make_accelerator(recipe.train.model_copy(update={"mixed_precision": "no"})).device
    trained = open_checkpoint(checkpoint)
    test = open_dataset(recipe.data.spec(), "test")
    if trained.spec.classes != test.classes:
        raise CheckpointError(
            f"{checkpoint} knows {trained.spec.num_classes} classes, the data has {len(test.classes)}.",
            remedy="Evaluate on the data set that the student was trained on.",
        )
    student = load_trained_student(trained).to(device)
    own = trained.spec.preprocessing
    return top1(student, EvaluationBatches(test, recipe.data, device=device, preprocessing=own))


def _build_teacher(recipe: Recipe, images: ImageSet) -> Teacher:
    return TEACHERS.build(recipe.teacher.name, num_classes=len(images.classes), image_size=recipe.data.image_size)


def _batches(train: ImageSet, recipe: Recipe, accelerator: Accelerator) -> Batches:
    return training_batches(
        train,
        recipe.data,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )


def _freeze(teacher: Teacher, recipe: Recipe, device: torch.device) -> FrozenTeacher:
    settings = recipe.train
    asked = settings.mixed_precision if settings.teacher_precision == "auto" else settings.teacher_precision
    frozen = FrozenTeacher(teacher, device, _PRECISIONS.get(_precision(asked)), settings.compile)
    own = preprocessing_of(recipe.data)
    mean, std = recipe.teacher.mean or own.mean, recipe.teacher.std or own.std
    student_mean, student_std = _column(own.mean), _column(own.std)
    frozen.renormalise(student_std / _column(std), (student_mean - _column(mean)) / _column(std))
    return frozen


def _column(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values).reshape(1, 3, 1, 1)


def _attach(student: Student, branches: BranchSpec | None) -> dict[str, ParallelBranches]:
    if branches is None:
        return {}
    attach_branches(student, branches)
    paths = branch_paths(student, branches)
    return {name: cast(ParallelBranches, student.get_submodule(path)) for name, path in paths.items()}


def _logits_only(frozen: FrozenTeacher) -> torch.nn.Module:
    class Logits(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return frozen(images).logits

    return Logits()


def rehearse(recipe: Recipe) -> None:
    """Build the networks and the distiller of ``recipe`` and attach its branches, without data or weights.

    Raises ``UnknownNameError``, ``ConfigError`` or ``ReparamError`` for what would stop the training only after minutes
    or hours.
    """
    DISTILLERS.check(recipe.distiller.name)
    size = recipe.data.image_size
    # Initialising a large teacher takes seconds. A distiller may read its values, so every weight is 1 instead.
    with init_empty_weights(include_buffers=False):
        teacher = TEACHERS.build(recipe.teacher.name, num_classes=2, image_size=size)
    values = {
        name: torch.ones_like(value, device="cpu") if value.is_meta else value
        for name, value in teacher.state_dict().items()
    }
    teacher.load_state_dict(values, assign=True)
    student = STUDENTS.build(recipe.student.name, num_classes=2, image_size=size)
    distiller = DISTILLERS.build(recipe.distiller.name, settings=recipe.distiller, student=student, teacher=teacher)
    spec = type(distiller).branch_spec(recipe.distiller, student, teacher)
    if spec is not None:
        attach_branches(student, spec)


def prepare_teacher(recipe: Recipe, directory: Path) -> Path:
    """The weights of the teacher of ``recipe``, trained into ``directory`` unless it names or that holds them."""
    if recipe.teacher.checkpoint:
        return Path(recipe.teacher.checkpoint)
    weights = directory / "model.safetensors"
    if not weights.is_file():
        train_teacher(recipe, directory)
    return weights


def distil(recipe: Recipe, directory: Path, teacher_directory: Path | None = None) -> Metrics:
    """Run ``recipe`` in ``directory``, continuing what is there; returns the metrics of the last epoch.

    A teacher without weights is trained in the run's own folder, or in ``teacher_directory``, which runs of several
    seeds share, with seed 0.
    """
    rehearse(recipe)
    accelerator = make_accelerator(recipe.train)
    with accelerator.main_process_first():
        claim(directory, recipe, "student")
        dataset = dataset_digest(recipe.data.spec(), directory / "dataset")
    # A run that is done only says so again: who asks has not worked on it.
    if accelerator.is_main_process and not (directory / "student").is_dir():
        note_environment(directory, device_name(), accelerator.num_processes)
    if teacher_directory is None:
        checkpoint = prepare_teacher(recipe, directory / "teacher")
    else:
        shared = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 0})})
        checkpoint = prepare_teacher(shared, teacher_directory)
    resolved = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"checkpoint": str(checkpoint)})})
    digest = sha256_file(checkpoint) if checkpoint.is_file() else ""
    return train_student(resolved, directory, Origin(dataset_sha256=dataset, teacher_sha256=digest))
