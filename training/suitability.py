"""Which methods of distillation a network of another origin can take, as teacher or as student."""

from pydantic import ValidationError

from kdexport.errors import ConfigError
from kdexport.students import Student
from training.distillers import DISTILLERS
from training.distillers.branched import BranchedDistiller
from training.distillers.distiller import Distiller, Output
from training.distillers.settings import BranchedSettings, DistillerSettings, settings_model
from training.foreign.network import ForeignStudent, ForeignTeacher
from training.foreign.plan import Plan
from training.recipe import Recipe
from training.teachers import Teacher

_READS: tuple[Output, ...] = ("features", "preactivations", "pooled")


def require_suitable(settings: DistillerSettings, student: Student, teacher: Teacher) -> None:
    """Raise ``ConfigError`` unless the method can read what it needs of both networks, with the methods that can.

    Registered networks have everything.
    """
    problem = unsuitable(settings, student, teacher)
    if problem:
        able = ", ".join(suitable_methods(student, teacher))
        raise ConfigError(f"{settings.name} cannot distil this pair: {problem}.", remedy=f"This pair can take: {able}.")


def require_compatible(recipe: Recipe) -> None:
    """Raise ``ConfigError`` if the method cannot work with how the recipe draws or mixes its images."""
    method, train = method_of(recipe.distiller), recipe.train
    mixing = next((key for key in ("mixup", "cutmix") if getattr(train, key) > 0), None)
    if method.needs_one_class and mixing is not None:
        raise ConfigError(
            f"train.{mixing} cannot be used with {recipe.distiller.name}, which needs the one class of each image.",
            remedy=f"Set train.{mixing}=0, or choose another method.",
        )
    if method.needs_distinct_images and train.sampling == "balanced":
        raise ConfigError(
            f"train.sampling = 'balanced' cannot be used with {recipe.distiller.name}: it repeats images in a batch.",
            remedy="Set train.class_weights=balanced instead.",
        )


def suitable_methods(student: Student, teacher: Teacher) -> tuple[str, ...]:
    """The registered methods that this pair can take with their default settings."""
    return tuple(name for name in DISTILLERS.names() if not unsuitable(default_settings(name), student, teacher))


def default_settings(name: str) -> DistillerSettings:
    """The settings of the method ``name`` with its defaults; only the common ones if it has keys without a default."""
    try:
        return settings_model(name)(name=name)
    except ValidationError:
        return DistillerSettings(name=name)


def unsuitable(settings: DistillerSettings, student: Student, teacher: Teacher) -> str:
    """Why the method cannot be used between these networks; empty if it can."""
    method = method_of(settings)
    problem = ""
    if isinstance(teacher, ForeignTeacher):
        reads = method.outputs_read(settings)
        problem = _missing(teacher.plan, reads, "teacher") or _guide_problem(settings, teacher)
    if not problem and isinstance(student, ForeignStudent):
        problem = _missing(student.plan, method.reads_of_student, "student")
        if not problem and issubclass(method, BranchedDistiller):
            assert isinstance(settings, BranchedSettings)
            problem = _branch_problem(settings, student)
    return problem


def method_of(settings: DistillerSettings) -> type[Distiller]:
    """The class of the method that ``settings`` name."""
    method = DISTILLERS.factory(settings.name)
    # A plugin may register a function; what it builds is taken to read everything.
    return method if isinstance(method, type) else Distiller


def _missing(plan: Plan, reads: frozenset[Output], role: str) -> str:
    """What a method reads of a network but ``plan`` cannot give it."""
    stages = [tap for tap in plan.taps if tap.tap.name.startswith("stage")]
    if reads & {"features", "preactivations"} and not stages:
        return f'it reads features of the {role}, but [{role}] has no taps; for example taps = {{ stage1 = "layer1" }}'
    hidden = next((tap for tap in stages if tap.hidden), None)
    if "preactivations" in reads and hidden is not None:
        return f"it reads the {role} before the activation of {hidden.path!r}, but {hidden.hidden}"
    if "pooled" in reads and not plan.classifier:
        return f"it reads the input of the {role}'s classifier, but no linear layer writes the logits"
    return ""


def _guide_problem(settings: DistillerSettings, teacher: ForeignTeacher) -> str:
    guided = isinstance(settings, BranchedSettings) and settings.target_guide > 0
    if guided and not teacher.plan.pools_by_average:
        return "target_guide needs a teacher whose classifier reads the average of its last tap, and this one does not"
    return ""


def _branch_problem(settings: BranchedSettings, student: ForeignStudent) -> str:
    if settings.placement == "R2":
        return "placement R2 widens the layer that reads a tap, which a network of another origin does not name; use R1"
    hosts = [tap for tap in student.plan.taps if tap.tap.name != "stem"]
    if not hosts:
        return 'its branches need taps of [student]; for example taps = { stage1 = "layer1" }'
    if hosts[-1].tap.name == "last" and len(hosts) > 1:
        # The convolution after the last stage takes its place.
        del hosts[-2]
    needed = hosts[-1:] if settings.layers == "single" else hosts
    missing = next((tap for tap in needed if tap.host is None), None)
    return "" if missing is None else f"branches cannot stand at {missing.tap.name}: {missing.no_host}"
