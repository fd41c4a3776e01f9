"""The teacher of a run: the preprocessing that it gets, and whether its predictions are plausible."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import CheckpointError, ConfigError
from kdexport.stats.plausibility import Judgement, judge
from training.data import Labelled, preprocessing_of
from training.evaluation import predict
from training.recipe import DataSettings, TeacherSettings

#: A quarter of a grey level: papers and recipes round their statistics.
_SAME = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherInput:
    """The preprocessing of a teacher, and where it comes from."""

    preprocessing: Preprocessing
    source: str

    def __str__(self) -> str:
        own = self.preprocessing
        size = f"{own.image_size}x{own.image_size} pixels"
        return f"mean {_numbers(own.mean)}, std {_numbers(own.std)}, {size} ({self.source})"


def teacher_input(
    settings: TeacherSettings, data: DataSettings, known: Preprocessing | None = None, place: str = ""
) -> TeacherInput:
    """The preprocessing of the teacher of a recipe with the tables ``settings`` and ``data``.

    ``known`` is that of its weights, which are at ``place``. If it is not known, ``mean`` and ``std`` of [teacher]
    decide, and without them those of the student. Raises ``ConfigError`` if [teacher] contradicts the weights.
    """
    student = preprocessing_of(data)
    if known is not None:
        _require_same("mean", settings.mean, known.mean, place)
        _require_same("std", settings.std, known.std, place)
        return TeacherInput(preprocessing=known, source=f"stored with {place}")
    if settings.mean is not None and settings.std is not None:
        own = replace(student, mean=settings.mean, std=settings.std)
        return TeacherInput(preprocessing=own, source="mean and std of [teacher] in the recipe")
    return TeacherInput(preprocessing=student, source="that of the student, because nothing else is known")


def _require_same(
    key: str, wanted: tuple[float, float, float] | None, known: tuple[float, float, float], place: str
) -> None:
    if wanted is None or all(abs(a - b) <= _SAME for a, b in zip(wanted, known, strict=True)):
        return
    raise ConfigError(
        f"{place} was trained with {key} {_numbers(known)}, but teacher.{key} of the recipe is {_numbers(wanted)}.",
        remedy=f"Remove teacher.{key} from the recipe, or set it to that of the weights: "
        f"--set teacher.{key}=[{', '.join(f'{value:g}' for value in known)}]",
    )


def _numbers(values: tuple[float, float, float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def judge_teacher(logits: nn.Module, batches: Iterable[Labelled], classes: Sequence[str]) -> Judgement:
    """Compare the predictions of a teacher in evaluation mode with the labels of ``batches``."""
    found = predict(logits, batches)
    return judge(found.predicted, found.labels, classes)


def require_plausible(judgement: Judgement, settings: TeacherSettings, classes: Sequence[str]) -> None:
    """Raise ``CheckpointError`` if there is a problem with the teacher and ``settings`` do not say to go on."""
    if not judgement.problem or settings.plausibility == "reported":
        return
    place = f" with the weights {settings.checkpoint}" if settings.checkpoint else ""
    shown = ", ".join(classes[:5]) + (f", ... ({len(classes)} in all)" if len(classes) > 5 else "")
    raise CheckpointError(
        f"The teacher {settings.name}{place} cannot teach this data set: {judgement.problem}.",
        remedy=f"Check its weights, its mean and std, and that its outputs are in the order of the classes: {shown}. "
        "To distil from it all the same: --set teacher.plausibility=reported",
    )
