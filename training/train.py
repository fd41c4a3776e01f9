"""The jobs of ``python -m training``: distil a student, train its teacher, evaluate either."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, cast

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.state import AcceleratorState

from kdexport.checkpoint import load_student as load_trained_student
from kdexport.checkpoint import open_checkpoint, save_tensors
from kdexport.core.digests import sha256_file
from kdexport.core.files import recover, replace_folder, write_file, write_text
from kdexport.core.progress import Reporter
from kdexport.data.datasets import ImageSet, class_difference, dataset_digest, described, open_dataset
from kdexport.errors import BackendUnavailableError, CheckpointError, ConfigError, TrainingError
from kdexport.reparam.blocks import BranchSpec, attach_branches, branch_paths
from kdexport.reparam.branches import ParallelBranches
from kdexport.students import Student, Tapped
from training.augmentation import Mixer
from training.batch_norms import set_momentum, slow_statistics
from training.data import Batches, EvaluationBatches, preprocessing_of, split_validation, training_batches
from training.devices import LocalBuffers, check_batch_size, choose_kernels, gathered, nondeterminism_named
from training.distillers import DISTILLERS
from training.evaluation import Predictions, predict
from training.foreign.network import ForeignTeacher
from training.networks import (
    GivenTeacher,
    build_student,
    fresh_teacher,
    given_teacher,
    require_outputs,
    require_weights,
    trainable_teacher,
)
from training.recipe import Recipe, TrainSettings, check_schedule, plugin_digests
from training.runs.averaging import WeightAverage
from training.runs.handover import Origin, hand_over, student_spec
from training.runs.loop import Metrics, Run, best_epoch, run
from training.runs.record import (
    claim,
    claim_input,
    claimed_if_trained,
    described_run,
    device_name,
    extensions,
    note_environment,
    recorded_inputs,
)
from training.runs.supervision import supervision
from training.runs.task import DistillationTask, FrozenTeacher, SupervisedTask
from training.runs.trackers import require_trackers
from training.runs.turns import Shared
from training.suitability import require_compatible, require_suitable
from training.teachers import Teacher
from training.teachers.description import TeacherDescription
from training.teaching import judge_teacher, require_plausible

_CALIBRATION_BATCHES = 8
#: Classes of the student in a rehearsal: a number that no network has by itself.
_ANY_CLASSES = 13
_BEST_TEACHER = "best.safetensors"
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
Precision = Literal["no", "bf16", "fp16"]


def distil(
    recipe: Recipe, directory: Path, teacher_directory: Path | None = None, shared: Shared | None = None
) -> Metrics:
    """Run ``recipe`` in ``directory`` or continue it there; returns the metrics of the last epoch.

    If the recipe has no teacher weights, the teacher is trained first: in the folder of the run, or with seed 0 in
    ``teacher_directory``, which runs with several seeds share. With ``shared`` other runs take turns with the steps of
    the student; a teacher is trained without a break, so that no other run finds half of it.
    """
    outputs = rehearse(recipe)
    accelerator = make_accelerator(recipe.train)
    with claimed_if_trained(directory, writes=accelerator.is_main_process):
        dataset = _claimed(recipe, directory, accelerator)
        if outputs is not None:
            # Before a teacher is trained.
            classes = len(open_dataset(recipe.data.spec(), "test").classes)
            require_outputs(recipe.student, outputs, classes)
        resolved, origin = _with_teacher(recipe, directory, teacher_directory, dataset)
        return train_student(resolved, directory, origin, shared)


def _claimed(recipe: Recipe, directory: Path, accelerator: Accelerator) -> str:
    """Make ``directory`` the folder of the run and of its data set; returns the digest of the data set."""
    with accelerator.main_process_first():
        claim(directory, recipe, "student")
        report = Reporter(quiet=not accelerator.is_main_process).say
        dataset = claim_data(directory, recipe, report)
        before = extensions(directory)
        if before:
            report(f"run extended from {before[-1]} to {recipe.train.epochs} epochs")
    # A finished run is only reported again, so this machine did no work on it.
    if accelerator.is_main_process and (before or not (directory / "student").is_dir()):
        note_environment(directory, device_name(), accelerator.num_processes)
    return dataset


def _with_teacher(
    recipe: Recipe, directory: Path, teacher_directory: Path | None, dataset: str
) -> tuple[Recipe, Origin]:
    """``recipe`` with the weights of its teacher, which is trained if there are none, and the inputs of the run."""
    if teacher_directory is None:
        checkpoint = prepare_teacher(recipe, directory / "teacher", dataset)
    else:
        first = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 0})})
        checkpoint = prepare_teacher(first, teacher_directory, dataset)
    resolved, digest = recipe, ""
    if checkpoint is not None:
        settings = recipe.teacher.model_copy(update={"checkpoint": str(checkpoint)})
        resolved = recipe.model_copy(update={"teacher": settings})
        digest = sha256_file(checkpoint) if checkpoint.is_file() else ""
    # Weights that were not read yet may be those of another network: they are recorded only when they are loaded.
    if digest and "teacher_sha256" in recorded_inputs(directory):
        claim_input(directory, "teacher_sha256", digest, str(checkpoint))
    origin = Origin(dataset_sha256=dataset, teacher_sha256=digest, extended_from=extensions(directory))
    return resolved, origin


def claim_data(directory: Path, recipe: Recipe, report: Callable[[str], None]) -> str:
    """Make the data set of ``recipe`` that of the run in ``directory``; returns its digest.

    ``report`` gets one line on the images. Raises ``ConfigError`` if the run has another data set.
    """
    spec = recipe.data.spec()
    dataset = dataset_digest(spec, directory / "dataset", report)
    claim_input(directory, "dataset_sha256", dataset, spec.root or spec.name)
    return dataset


def claim_start(directory: Path, recipe: Recipe) -> None:
    """Make the file of weights that the teacher of ``recipe`` is fine-tuned from, if any, that of the run.

    Raises ``ConfigError`` if the run in ``directory`` started from another file, and for a registered teacher, which is
    trained from fresh weights and would not read the file.
    """
    file = recipe.teacher.checkpoint
    if not file:
        return
    if not recipe.teacher.is_reference:
        raise ConfigError(
            f"The teacher {recipe.teacher.name} is trained from fresh weights, but teacher.checkpoint is {file}.",
            remedy="Remove teacher.checkpoint. To use these weights, run kdexport train; to fine-tune a network from "
            "weights, name it as torchvision:NAME, timm:NAME or MODULE:FACTORY.",
        )
    claim_input(directory, "teacher_sha256", sha256_file(Path(file)), file)


def rehearse(recipe: Recipe) -> int | None:
    """Check the schedule, build the networks and the distiller of ``recipe`` and attach its branches, without data.

    Returns the number of classes of a student that takes no other; None if it takes any. Raises ``UnknownNameError``,
    ``ConfigError`` or ``ReparamError`` for mistakes that would otherwise end the run only after the teacher's training.
    """
    check_schedule(recipe)
    DISTILLERS.check(recipe.distiller.name)
    require_trackers(recipe.train.trackers)
    require_compatible(recipe)
    require_weights(recipe)
    teacher = _rehearsed_teacher(recipe)
    student = build_student(
        recipe.student, num_classes=_ANY_CLASSES, image_size=recipe.data.image_size, pretrained=False
    )
    outputs = student.num_classes
    require_suitable(recipe.distiller, student, teacher)
    distiller = DISTILLERS.build(recipe.distiller.name, settings=recipe.distiller, student=student, teacher=teacher)
    spec = type(distiller).branch_spec(recipe.distiller, student, teacher)
    if spec is not None:
        attach_branches(student, spec)
    return None if outputs == _ANY_CLASSES else outputs


def _rehearsed_teacher(recipe: Recipe) -> Teacher:
    if recipe.teacher.is_reference:
        return fresh_teacher(recipe)
    # Initialising a large teacher takes seconds. A distiller may read its values, so every weight is 1 instead.
    with init_empty_weights(include_buffers=False):
        teacher = fresh_teacher(recipe)
    values = {
        name: torch.ones_like(value, device="cpu") if value.is_meta else value
        for name, value in teacher.state_dict().items()
    }
    teacher.load_state_dict(values, assign=True)
    return teacher


def prepare_teacher(recipe: Recipe, directory: Path, dataset_sha256: str) -> Path | None:
    """The file of the teacher's weights: that of the recipe, or else in ``directory``, where the teacher is trained.

    None if the recipe names weights of a library. Raises ``ConfigError`` if the teacher in ``directory`` is of another
    data set.
    """
    if recipe.teacher.checkpoint:
        return Path(recipe.teacher.checkpoint)
    if recipe.teacher.weights:
        return None
    claim_input(directory, "dataset_sha256", dataset_sha256, recipe.data.root or recipe.data.name)
    weights = directory / "model.safetensors"
    if not weights.is_file():
        train_teacher(recipe, directory)
    return weights


def train_teacher(recipe: Recipe, directory: Path) -> Metrics:
    """Train the recipe's teacher with cross-entropy; returns the metrics of the last epoch.

    The weights are ``directory``/model.safetensors.
    """
    settings = recipe.train.model_copy(
        update={
            "epochs": recipe.teacher.epochs,
            "learning_rate": recipe.teacher.learning_rate,
            "compile": _compiling(recipe),
        }
    )
    accelerator = make_accelerator(settings)
    train, test = open_dataset(recipe.data.spec(), "train"), open_dataset(recipe.data.spec(), "test")
    say = Reporter(quiet=not accelerator.is_main_process).say
    torch.manual_seed(settings.seed)
    teacher, own, size = trainable_teacher(recipe, len(train.classes), say)
    say(f"teacher {recipe.teacher.name}: {own}")
    # The teacher is trained with the normalisation of its inputs during distillation.
    changed = {
        "mean": own.preprocessing.mean,
        "std": own.preprocessing.std,
        "image_size": size,
        "resize": own.preprocessing.resize if size != recipe.data.image_size else recipe.data.resize,
    }
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=changed)})
    set_momentum(teacher, settings.batch_norm_momentum)
    teacher.to(accelerator.device)
    teacher.to(memory_format=torch.channels_last)
    kept, validation = split_validation(train, settings.validation)
    batches = _batches(kept, recipe, accelerator)
    task = SupervisedTask(teacher, supervision(settings, torch.from_numpy(kept.labels))).to(accelerator.device)
    average = WeightAverage(teacher, settings.ema) if settings.ema > 0 else None
    trained = teacher if average is None else average.network
    # The names of the network itself, without those of the wrapper around it.
    network = trained.network if isinstance(trained, ForeignTeacher) else trained
    about = TeacherDescription(classes=train.classes, preprocessing=own.preprocessing)

    def keep(name: str) -> None:
        metadata = about.metadata(recipe.teacher.name)
        write_file(directory / name, lambda path: save_tensors(path, network.state_dict(), metadata))

    _say_slow_statistics(f"teacher {recipe.teacher.name}", teacher, settings.epochs * batches.steps, say)
    job = Run(
        directory=directory,
        title=f"teacher {recipe.teacher.name}",
        settings=settings,
        branches=(0, 1),
        task=task,
        network=teacher,
        batches=batches,
        evaluation=_evaluation(test, recipe, accelerator),
        teach=lambda _: None,
        keep_best=(lambda _: keep(_BEST_TEACHER)) if settings.patience else None,
        mix=_mixer(settings, train),
        average=average,
        validation=None if validation is None else _evaluation(validation, recipe, accelerator),
        classes=train.classes,
        foreign=_foreign(recipe, "teacher"),
        described=described_run(recipe, "teacher"),
    )
    try:
        with nondeterminism_named():
            history = run(job, accelerator)
    except TrainingError as error:
        # The keys of the student do not change the teacher.
        remedy = "Lower teacher.learning_rate, or raise train.warmup_epochs."
        raise TrainingError(f"teacher {recipe.teacher.name}: {error.message}", remedy=remedy) from error
    metrics = best_epoch(history) if settings.patience else history[-1]
    if accelerator.is_main_process:
        written = {**about.to_json(recipe.teacher.name), "metrics": metrics}
        write_text(directory / "teacher.json", json.dumps(written, indent=2))
        # The weights are written last: they mark the teacher as complete.
        if settings.patience:
            (directory / _BEST_TEACHER).replace(directory / "model.safetensors")
        else:
            keep("model.safetensors")
    accelerator.wait_for_everyone()
    return metrics


def train_student(recipe: Recipe, directory: Path, origin: Origin, shared: Shared | None = None) -> Metrics:
    """Distil the recipe's student into ``directory``/student; returns the metrics of the last epoch."""
    accelerator = make_accelerator(recipe.train)
    train, test = open_dataset(recipe.data.spec(), "train"), open_dataset(recipe.data.spec(), "test")
    train, validation = split_validation(train, recipe.train.validation)
    evaluation = _evaluation(test, recipe, accelerator)
    batches = _batches(train, recipe, accelerator)
    say = Reporter(quiet=not accelerator.is_main_process).say
    distillation = prepare_distillation(recipe, train, batches, accelerator.device, say=say)
    teacher_top1 = _judged(recipe, distillation, evaluation, test, say)
    _say_slow_statistics(
        f"student {recipe.student.name}", distillation.student, recipe.train.epochs * batches.steps, say
    )
    if origin.teacher_sha256:
        with accelerator.main_process_first():
            claim_input(directory, "teacher_sha256", origin.teacher_sha256, recipe.teacher.checkpoint)

    average = WeightAverage(distillation.student, recipe.train.ema) if recipe.train.ema > 0 else None
    handed = distillation.student if average is None else cast(Student, average.network)

    def keep(name: str, metrics: Metrics) -> None:
        spec = student_spec(recipe, train, distillation.branches, metrics, origin)
        hand_over(directory / name, handed, spec)

    measured = {} if teacher_top1 is None else {"teacher_top1": teacher_top1}

    def keep_best(metrics: Metrics) -> None:
        keep("best", {**metrics, **measured, "best_epoch_top1": metrics["top1"]})

    job = Run(
        directory=directory,
        title=f"student {recipe.student.name}",
        settings=recipe.train.model_copy(update={"compile": _compiling(recipe)}),
        branches=(distillation.layers, distillation.branches.num_branches if distillation.branches else 1),
        task=distillation.task,
        network=distillation.student,
        batches=batches,
        evaluation=evaluation,
        teach=distillation.frozen,
        diversity=distillation.diversity if distillation.branches else None,
        keep_best=keep_best,
        teacher_top1=teacher_top1,
        mix=_mixer(recipe.train, train),
        average=average,
        validation=None if validation is None else _evaluation(validation, recipe, accelerator),
        classes=train.classes,
        foreign=_foreign(recipe, "student", "teacher", "distiller"),
        described=described_run(recipe, "student"),
        shared=shared,
    )
    if accelerator.is_main_process:
        recover(directory / "best")
    with nondeterminism_named():
        history = run(job, accelerator)
    best = best_epoch(history)
    last = best if recipe.train.patience else history[-1]
    metrics = {**last, **measured, "best_epoch_top1": best["top1"]}
    if accelerator.is_main_process:
        if recipe.train.patience:
            # It was not chosen on the test split, so that its top-1 there is a result.
            replace_folder(directory / "best", directory / "student")
        else:
            keep("student", metrics)
    return metrics


def _mixer(settings: TrainSettings, train: ImageSet) -> Mixer | None:
    return Mixer(settings, len(train.classes)) if settings.mixup > 0 or settings.cutmix > 0 else None


def _evaluation(images: ImageSet, recipe: Recipe, accelerator: Accelerator) -> EvaluationBatches:
    """The batches of ``images`` that this process evaluates."""
    return EvaluationBatches(
        images,
        recipe.data,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )


def _say_slow_statistics(name: str, network: torch.nn.Module, steps: int, say: Callable[[str], None]) -> None:
    note = slow_statistics(network, steps)
    if note:
        say(f"{name}: {note}")


def _judged(
    recipe: Recipe,
    distillation: "Distillation",
    evaluation: EvaluationBatches,
    test: ImageSet,
    say: Callable[[str], None],
) -> float | None:
    """Top-1 of the teacher, which must be plausible if the method reads it; None if its outputs are other classes."""
    name = f"teacher {recipe.teacher.name}"
    say(f"{name}: {distillation.given.given}")
    if distillation.given.problem:
        say(f"{name}: no top-1, because {distillation.given.problem}; only its features are read")
        return None
    judgement = judge_teacher(_logits_only(distillation.frozen), evaluation, test.classes)
    say(f"{name}: {judgement}")
    if distillation.task.distiller.outputs_read(recipe.distiller):
        require_plausible(judgement, recipe.teacher, test.classes)
    return judgement.top1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Distillation:
    """Networks and distiller, ready to train; branches are compared on the batch ``compared`` (N,3,S,S)."""

    student: Student
    given: GivenTeacher
    frozen: FrozenTeacher
    branches: BranchSpec | None
    layers: int
    task: DistillationTask
    compared: torch.Tensor

    def diversity(self) -> Metrics:
        """Measures of how the branches differ at present, by name."""
        return self.task.diversity(self.compared, self.frozen(self.compared))


def prepare_distillation(
    recipe: Recipe,
    train: ImageSet,
    batches: Batches,
    device: torch.device,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Distillation:
    """Build the networks and the distiller of ``recipe`` with its seed, and calibrate the distiller.

    ``say`` gets one line if the file of the teacher's weights was not used as it is.
    """
    DISTILLERS.check(recipe.distiller.name)
    given = given_teacher(recipe, train, say)
    teacher = given.teacher
    torch.manual_seed(recipe.train.seed)
    size = recipe.data.image_size
    student = build_student(recipe.student, num_classes=len(train.classes), image_size=size, say=say)
    require_suitable(recipe.distiller, student, teacher)
    frozen = freeze(given, recipe, device)
    distiller = DISTILLERS.build(recipe.distiller.name, settings=recipe.distiller, student=student, teacher=teacher)
    branches = type(distiller).branch_spec(recipe.distiller, student, teacher)
    layers = _attach(student, branches)
    set_momentum(student, recipe.train.batch_norm_momentum)
    distiller.prepare(torch.from_numpy(train.labels))
    by_share = distiller.calibrates_by_share
    distiller.calibrate(_calibration(batches, frozen, by_share=by_share))
    supervised = supervision(recipe.train, torch.from_numpy(train.labels))
    task = DistillationTask(student, distiller, layers, supervised).to(device)
    task.to(memory_format=torch.channels_last)
    return Distillation(
        student=student,
        given=given,
        frozen=frozen,
        branches=branches,
        layers=len(layers),
        task=task,
        compared=gathered(next(batches.epoch(0)).images),
    )


def evaluate_teacher(recipe: Recipe) -> float:
    """Top-1 of the recipe's teacher checkpoint on the test split, in full precision."""
    return predictions_of_teacher(recipe)[0].top1


def _calibration(batches: Batches, frozen: FrozenTeacher, *, by_share: bool) -> Iterator[Tapped]:
    """The teacher's outputs for the first batches, each computed when it is taken: one is in memory, as in a step."""
    for batch in islice(batches.epoch(0), _CALIBRATION_BATCHES):
        yield frozen(batch.images if by_share else gathered(batch.images))


def predictions_of_teacher(recipe: Recipe) -> tuple[Predictions, tuple[str, ...]]:
    """What the recipe's teacher predicts for the test split, in full precision, and the classes."""
    device = make_accelerator(recipe.train.model_copy(update={"mixed_precision": "no"})).device
    test = _reported_test_split(recipe)
    say = Reporter().say
    given = given_teacher(recipe, test, say)
    say(f"teacher {recipe.teacher.name}: {given.given}")
    if given.problem:
        raise CheckpointError(
            f"The teacher {recipe.teacher.name} cannot be evaluated on these classes: {given.problem}, the data set "
            f"has {len(test.classes)}.",
            remedy="Fine-tune it first with kdexport teacher.",
        )
    exact = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"mixed_precision": "no", "teacher_precision": "no"})}
    )
    logits = _logits_only(freeze(given, exact, device))
    return predict(logits, EvaluationBatches(test, recipe.data, device=device)), test.classes


def evaluate_student(recipe: Recipe, checkpoint: Path) -> float:
    """Top-1 of a student checkpoint on the test split of the recipe's data, in full precision."""
    return predictions_of_student(recipe, checkpoint)[0].top1


def predictions_of_student(recipe: Recipe, checkpoint: Path) -> tuple[Predictions, tuple[str, ...]]:
    """What a student checkpoint predicts for the test split of the recipe's data, and the classes."""
    device = make_accelerator(recipe.train.model_copy(update={"mixed_precision": "no"})).device
    trained = open_checkpoint(checkpoint)
    test = _reported_test_split(recipe)
    if trained.spec.classes != test.classes:
        difference = class_difference(trained.spec.classes, test.classes, "the checkpoint", "the data set")
        raise CheckpointError(
            f"{checkpoint} was trained for {trained.spec.num_classes} classes, the data set has {len(test.classes)}: "
            f"{difference}.",
            remedy="Pass --data with the data set that the student was trained on.",
        )
    student = load_trained_student(trained).to(device)
    own = trained.spec.preprocessing
    batches = EvaluationBatches(test, recipe.data, device=device, preprocessing=own)
    return predict(student, batches), test.classes


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """CUDA if there is a device, otherwise the CPU; several processes under ``accelerate launch`` or ``torchrun``.

    Raises ``ConfigError`` if the processes cannot divide a batch evenly.
    """
    # Without cpu=True, accelerate does not connect the processes of torchrun on a machine without a GPU.
    precision = _precision(settings.mixed_precision)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        # accelerate has one precision for each process; the cells of a table may have several.
        AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
    accelerator.ddp_handler = LocalBuffers()
    choose_kernels(accelerator.device, deterministic=settings.deterministic)
    check_batch_size(settings.batch_size, accelerator.num_processes)
    return accelerator


def process_settings(recipe: Recipe) -> tuple[Precision, bool]:
    """What ``make_accelerator`` sets for the whole process, so that runs at once must agree on it."""
    return _precision(recipe.train.mixed_precision), recipe.train.deterministic


def _precision(setting: str) -> Precision:
    if setting == "auto":
        return "bf16" if _has_bf16() else "no"
    if setting == "fp16" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "train.mixed_precision or train.teacher_precision is 'fp16', which needs a CUDA device, and there is none.",
            remedy="Set it to 'no' or 'bf16', or run on a machine with a GPU.",
        )
    return "bf16" if setting == "bf16" else "fp16" if setting == "fp16" else "no"


def _has_bf16() -> bool:
    """Whether a GPU multiplies bf16 itself; on those before Ampere torch emulates it, slower than float32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _reported_test_split(recipe: Recipe) -> ImageSet:
    test = open_dataset(recipe.data.spec(), "test")
    Reporter().say(described({"test": test}))
    return test


def _batches(train: ImageSet, recipe: Recipe, accelerator: Accelerator) -> Batches:
    return training_batches(
        train,
        recipe.data,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        balanced=recipe.train.sampling == "balanced",
    )


def freeze(given: GivenTeacher, recipe: Recipe, device: torch.device) -> FrozenTeacher:
    """``given`` in evaluation mode, which gets the images of ``recipe`` in its own normalisation and size."""
    settings, teacher = recipe.train, given.teacher
    precision = settings.mixed_precision if settings.teacher_precision == "auto" else settings.teacher_precision
    frozen = FrozenTeacher(teacher, device, _PRECISIONS.get(_precision(precision)), _compiling(recipe))
    student, own = preprocessing_of(recipe.data), given.given.preprocessing
    mean, std = _column(own.mean), _column(own.std)
    frozen.renormalise(_column(student.std) / std, (_column(student.mean) - mean) / std)
    frozen.resize(own.image_size)
    return frozen


def _compiling(recipe: Recipe) -> Literal["auto", "no", "yes"]:
    """Networks of other origins are not compiled by themselves: their code may not be compilable."""
    foreign = recipe.teacher.is_reference or recipe.student.is_reference
    return "no" if foreign and recipe.train.compile == "auto" else recipe.train.compile


def _foreign(recipe: Recipe, *tables: Literal["student", "teacher", "distiller"]) -> str:
    """The first of ``tables`` whose code is not of this project, in words; empty if there is none."""
    plugins = plugin_digests(recipe)
    for table in tables:
        name = getattr(recipe, table).name
        if table in plugins or ":" in name:
            return f"the {table} {name}"
    return ""


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
