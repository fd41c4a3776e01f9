"""The networks of a recipe: registered ones, and those of other origins with their weights."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kdexport.data.datasets import ImageSet, class_difference
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import CheckpointError, ConfigError
from kdexport.origins import libraries
from kdexport.origins.networks import ImportedNetwork, import_network
from kdexport.origins.references import Reference, parse_reference
from kdexport.origins.weights import Weights, load_weights, read_weights
from kdexport.students import STUDENTS, Student
from kdexport.students.student import IMAGENET_MIN_SIZE, is_full
from training.data import preprocessing_of
from training.foreign.network import ForeignStudent, ForeignTeacher
from training.foreign.probe import BATCH, require_logits, trained_output
from training.recipe import Recipe, StudentSettings, TeacherSettings
from training.suitability import default_settings, method_of, suitable_methods
from training.teachers import TEACHERS, Teacher
from training.teachers.description import TeacherDescription, described_teacher
from training.teachers.teacher import outputs_in_weights, read_teacher_weights
from training.teaching import TeacherInput, teacher_input

Say = Callable[[str], None]


def _reference(settings: StudentSettings | TeacherSettings, role: str) -> Reference | None:
    """The reference that names the network; raises ``ConfigError`` for one that cannot be used in training."""
    reference = parse_reference(settings.name) if settings.is_reference else None
    if reference is not None and reference.kind == "program":
        raise ConfigError(
            f"The {role} {settings.name} is an exported program, whose modules and training mode are gone.",
            remedy=f'Name what it was exported from, to train it: {role}.name = "MODULE:FACTORY". To build a trained '
            f"program as it is: kdexport build --student {settings.name} --data DIR.",
        )
    return reference


def require_weights(recipe: Recipe) -> None:
    """Raise unless the weights that a recipe names exist, before data is read or a teacher is trained.

    ``CheckpointError`` for a file that is missing, ``UnknownNameError`` for a name that the library does not have.
    """
    teacher, student = recipe.teacher, recipe.student
    _require_weights("teacher", _reference(teacher, "teacher"), teacher.checkpoint, teacher.weights)
    file = student.weights if student.starts_from_a_file else ""
    named = student.weights or ("DEFAULT" if student.pretrained else "")
    _require_weights("student", _reference(student, "student"), file, "" if file else named)


def _require_weights(role: str, reference: Reference | None, file: str, named: str) -> None:
    if file and not Path(file).exists():
        option = "--teacher-checkpoint or teacher.checkpoint" if role == "teacher" else "student.weights"
        raise CheckpointError(f"There is no file {file} with weights of the {role}.", remedy=f"Check {option}.")
    if reference is not None and named:
        libraries.require_weights(reference, named)


def build_student(
    settings: StudentSettings, *, num_classes: int, image_size: int, pretrained: bool = True, say: Say = lambda _: None
) -> Student:
    """The student of a recipe with fresh weights, or a network of another origin with those that ``settings`` name.

    ``pretrained=False`` leaves weights out, and takes a network of any number of classes. ``say`` gets one line on what
    was done to the network.
    """
    reference = _reference(settings, "student")
    if reference is None:
        return _registered_student(settings, num_classes, image_size, say)
    weights = settings.weights or ("DEFAULT" if settings.pretrained else None)
    made = import_network(
        reference,
        num_classes=num_classes,
        image_size=image_size,
        weights=weights if pretrained else None,
        head="fresh",
    )
    student = ForeignStudent(made.module.train(), settings.taps, image_size=image_size, name=str(reference))
    # Without weights it is only looked at, with any number of classes.
    if pretrained:
        require_outputs(settings, student.num_classes, num_classes)
    _say_notes(say, f"student {reference}", made)
    return student


def _registered_student(settings: StudentSettings, num_classes: int, image_size: int, say: Say) -> Student:
    has_forms = "form" in inspect.signature(STUDENTS.factory(settings.name)).parameters
    if settings.form != "auto" and not has_forms:
        raise ConfigError(f"The student {settings.name} has one form only.", remedy="Remove student.form.")
    form = {"form": settings.form} if has_forms else {}
    student = STUDENTS.build(settings.name, num_classes=num_classes, image_size=image_size, **form)
    if has_forms:
        chosen = "full" if is_full(settings.form, image_size) else "small"
        reason = (
            f"data.image_size is {image_size}, and student.form is not set: small below {IMAGENET_MIN_SIZE} pixels"
            if settings.form == "auto"
            else f"student.form is {settings.form}"
        )
        say(f"student {settings.name}: the {chosen} form, because {reason}")
    return student


def require_outputs(settings: StudentSettings, outputs: int, classes: int) -> None:
    """Raise ``ConfigError`` if the student of a recipe has other ``outputs`` than the data set has ``classes``."""
    if outputs != classes:
        raise _other_classes(f"The student {settings.name}", outputs, classes)


def _other_classes(what: str, found: int, wanted: int) -> ConfigError:
    return ConfigError(
        f"{what} has {found} outputs, the data set has {wanted} classes.",
        remedy="Let its factory take num_classes and return a network with as many outputs.",
    )


def _say_notes(say: Say, what: str, made: ImportedNetwork) -> None:
    notes = [note for note in made.notes if "evaluation mode" not in note]
    if notes:
        say(f"{what}: {'; '.join(notes)}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GivenTeacher:
    """A teacher with its weights and its preprocessing; ``problem`` is why its logits cannot be used, or empty."""

    teacher: Teacher
    given: TeacherInput
    problem: str = ""


def fresh_teacher(recipe: Recipe) -> Teacher:
    """The teacher of a recipe with any weights, for a check of what can be done with it; its classes do not count."""
    reference = _reference(recipe.teacher, "teacher")
    known = _described(recipe)
    given = teacher_input(recipe.teacher, recipe.data, known.preprocessing, recipe.teacher.checkpoint)
    if reference is None:
        size = given.preprocessing.image_size
        return TEACHERS.build(recipe.teacher.name, num_classes=2, image_size=size)
    size_or_own = _image_size(recipe, known)
    made = import_network(reference, num_classes=2, image_size=size_or_own)
    return _wrapped(recipe, reference, made, size_or_own)


def trainable_teacher(recipe: Recipe, num_classes: int, say: Say) -> tuple[Teacher, TeacherInput, int]:
    """The teacher of a recipe before its training, the preprocessing that it is trained with, and its image size.

    A network of another origin starts from the weights that the recipe names, with a fresh classifier if they have
    other classes.
    """
    reference = _reference(recipe.teacher, "teacher")
    size = recipe.teacher.image_size or recipe.data.image_size
    if reference is None:
        own = teacher_input(recipe.teacher, recipe.data)
        return TEACHERS.build(recipe.teacher.name, num_classes=num_classes, image_size=size), own, size
    weights = recipe.teacher.checkpoint or recipe.teacher.weights or None
    made = import_network(reference, num_classes=num_classes, image_size=size, weights=weights, head="fresh")
    stated = made.preprocessing if weights == recipe.teacher.weights else None
    known = _described(recipe).preprocessing if recipe.teacher.checkpoint else stated
    if known is not None:
        # Only the statistics: it is trained on the images of the recipe.
        known = replace(preprocessing_of(recipe.data), mean=known.mean, std=known.std)
    own = teacher_input(recipe.teacher, recipe.data, known, f"{reference} ({weights})")
    own = replace(own, preprocessing=_of_size(own.preprocessing, size))
    teacher = ForeignTeacher(made.module, {}, image_size=size, name=str(reference))
    require_logits(trained_output(teacher.network, size), BATCH, f"The teacher {reference}, in training mode,")
    if teacher.num_classes != num_classes:
        raise _other_classes(f"The teacher {reference}", teacher.num_classes, num_classes)
    _say_notes(say, f"teacher {reference}", made)
    return teacher, own, size


def _of_size(preprocessing: Preprocessing, size: int) -> Preprocessing:
    if preprocessing.image_size == size:
        return preprocessing
    resize = max(size, round(preprocessing.resize * size / preprocessing.image_size))
    return replace(preprocessing, image_size=size, resize=resize)


def given_teacher(recipe: Recipe, images: ImageSet, say: Say) -> GivenTeacher:
    """The teacher of a recipe with its trained weights.

    Raises ``CheckpointError`` if there are none, if they cannot be read, or if the method reads logits and these are of
    other classes, by their number or by the description of the weights: logits are matched with classes by position.
    """
    settings = recipe.teacher
    reference = _reference(settings, "teacher")
    if not settings.checkpoint and not (reference is not None and settings.weights):
        raise CheckpointError(
            f"The recipe has no file with weights of the teacher {settings.name}.",
            remedy="Pass --teacher-checkpoint FILE.",
        )
    known = _described(recipe)
    others = _other_training_classes(recipe, images, known)
    if reference is not None:
        return _foreign_teacher(recipe, reference, images, known, others, say)
    path = Path(settings.checkpoint)
    given = teacher_input(settings, recipe.data, known.preprocessing, str(path))
    size, count = given.preprocessing.image_size, len(images.classes)
    weights = read_teacher_weights(path)
    teacher, problem = TEACHERS.build(settings.name, num_classes=count, image_size=size), others
    outputs = None if _method_reads_logits(recipe) else outputs_in_weights(teacher, weights)
    if outputs not in (None, count):
        # With its own classifier, whose weight the target guide reads.
        teacher = TEACHERS.build(settings.name, num_classes=outputs, image_size=size)
        problem = others or f"its file has a classifier of {outputs} classes"
    notes = (*weights.notes, *load_weights(teacher, weights, str(path)))
    if notes:
        say(f"read {path}: {'; '.join(notes)}")
    return GivenTeacher(teacher=teacher, given=given, problem=problem)


def _other_training_classes(recipe: Recipe, images: ImageSet, known: TeacherDescription) -> str:
    """Which other classes a teacher was trained for, by its description; empty if they are those of ``images``.

    Raises ``CheckpointError`` unless the method of the recipe reads features only and any teacher is accepted.
    """
    if known.classes is None or known.classes == images.classes:
        return ""
    difference = class_difference(known.classes, images.classes, "the teacher", "the data set")
    by_features = not _method_reads_logits(recipe)
    if by_features and recipe.teacher.plausibility == "reported":
        return f"it was trained for {len(known.classes)} other classes ({difference})"
    reported = " To read only its features all the same: --set teacher.plausibility=reported" if by_features else ""
    raise CheckpointError(
        f"The teacher {recipe.teacher.checkpoint} was trained for {len(known.classes)} classes, the data set has "
        f"{len(images.classes)}: {difference}.",
        remedy="Pass --teacher-checkpoint with a teacher of this data set, or the data set that it was trained "
        f"on.{reported}",
    )


def _method_reads_logits(recipe: Recipe) -> bool:
    return "logits" in method_of(recipe.distiller).outputs_read(recipe.distiller)


def _foreign_teacher(
    recipe: Recipe, reference: Reference, images: ImageSet, known: TeacherDescription, others: str, say: Say
) -> GivenTeacher:
    settings, count = recipe.teacher, len(images.classes)
    size = _image_size(recipe, known)
    made, kept_head = _with_weights(recipe, reference, count, size)
    preprocessing, place = known.preprocessing, settings.checkpoint
    if not settings.checkpoint:
        preprocessing, place = made.preprocessing, f"{reference} ({settings.weights})"
    teacher = _wrapped(recipe, reference, made, size)
    given = teacher_input(settings, recipe.data, preprocessing, place)
    given = replace(given, preprocessing=_of_size(given.preprocessing, teacher.image_size))
    problem = others or ("" if kept_head else "its file has a classifier of other classes")
    if not problem and teacher.num_classes != count:
        problem = f"it has {teacher.num_classes} classes"
    if problem and _method_reads_logits(recipe):
        student = build_student(recipe.student, num_classes=count, image_size=recipe.data.image_size, pretrained=False)
        readers = [name for name in suitable_methods(student, teacher) if not _reads_logits(name)]
        raise CheckpointError(
            f"The teacher {reference} cannot teach {recipe.distiller.name}, which reads its logits: {problem}, the "
            f"data set has {count}.",
            remedy="Fine-tune it first: kdexport teacher with the same options, then pass its "
            "model.safetensors with --teacher-checkpoint. Or use a method that reads only features: "
            f"{', '.join(readers)}.",
        )
    _say_notes(say, f"teacher {reference}", made)
    return GivenTeacher(teacher=teacher, given=given, problem=problem)


def _reads_logits(name: str) -> bool:
    settings = default_settings(name)
    return "logits" in method_of(settings).outputs_read(settings)


def _with_weights(recipe: Recipe, reference: Reference, count: int, size: int | None) -> tuple[ImportedNetwork, bool]:
    """The network with its weights, and whether the classifier is that of the weights."""
    settings = recipe.teacher
    weights = settings.checkpoint or settings.weights
    read: Weights | None = read_weights(Path(settings.checkpoint)) if settings.checkpoint else None
    try:
        return import_network(reference, num_classes=count, image_size=size, weights=weights, read=read), True
    except CheckpointError:
        if read is None:
            raise
        # A file of other classes: its features can be read all the same.
        made = import_network(reference, num_classes=count, image_size=size, weights=weights, head="fresh", read=read)
        return made, False


def _described(recipe: Recipe) -> TeacherDescription:
    checkpoint = recipe.teacher.checkpoint
    return described_teacher(Path(checkpoint)) if checkpoint else TeacherDescription()


def _image_size(recipe: Recipe, known: TeacherDescription) -> int | None:
    """Pixels a side of the images of a teacher of another origin; None for those that its library states."""
    if recipe.teacher.image_size is not None:
        return recipe.teacher.image_size
    if known.preprocessing is not None:
        return known.preprocessing.image_size
    return None if recipe.teacher.weights and not recipe.teacher.checkpoint else recipe.data.image_size


def _wrapped(recipe: Recipe, reference: Reference, made: ImportedNetwork, size: int | None) -> ForeignTeacher:
    stated = made.preprocessing.image_size if made.preprocessing is not None else recipe.data.image_size
    return ForeignTeacher(made.module, recipe.teacher.taps, image_size=size or stated, name=str(reference))
