"""Quantize-aware training as a stage of a build: the folded student trained further as the int8 graph of a target."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdexport.backends.base import ONNX_FILE as MODEL
from kdexport.build.artifacts import FusedFiles, OnnxModel, QuantizeAwareFiles
from kdexport.build.stages import CAST_TOOLS, calibrate, copy_ranges, is_int8, weight_bits, write_ranges
from kdexport.bundle.layout import RANGES
from kdexport.checkpoint import TrainedStudent, load_tensors, save_tensors
from kdexport.data.calibration_images import Calibration
from kdexport.errors import ConfigError
from kdexport.targets import Target
from kdexport.workspace import Making, Step

if TYPE_CHECKING:
    # Values of settings are in the keys; the other tables of a configuration are nothing to a stage.
    from kdexport.config import BuildConfig, QuantizeAwareSettings

_STATE, _HISTORY = "student.safetensors", "history.json"
_RUN, _JOB, _PLAIN, _START, _START_RANGES = "run", "job.json", "plain.onnx", "start.onnx", "start.json"
#: Batches of images on which channels are equalised: all values of all of them are in memory at once.
_EQUALISED_ON = 2
#: Files that ``training.quantize_aware`` writes.
_TRAINED, _TRAINED_RANGES, _METRICS = "trained.safetensors", "trained_ranges.json", "quantize_aware.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """What the student learns from: the recipe with its teacher, or without a recipe the float32 student itself.

    ``material`` is the part of the key: the recipe without paths, and digests of the teacher and of plugins.
    """

    settings: "QuantizeAwareSettings"
    recipe: str
    overrides: dict[str, Any]
    material: tuple[Any, ...]
    #: Trains the graph of a job, a JSON file, into a folder.
    train: Callable[[Path, Path], None]

    def to_json(self) -> dict[str, Any]:
        """The entry of the manifest."""
        return self.settings.model_dump(mode="json", exclude={"enabled"})


def require_trainable(targets: Sequence[Target], config: "BuildConfig") -> None:
    """Raise ``ConfigError`` if quantize-aware training has nothing to train for, or no teacher."""
    if not any(target.precision == "int8" for target in targets):
        raise ConfigError(
            f"Quantize-aware training needs an int8 target; the targets are {', '.join(map(str, targets))}.",
            remedy="Add one, for example onnx-int8, or set enabled = false under [quantize_aware].",
        )
    if config.precision_search.enabled:
        raise ConfigError(
            "Quantize-aware training and the precision search are both enabled, and a build has one of them: the "
            "search would measure layers of a student that is trained further.",
            remedy="Set enabled = false under [precision_search] or under [quantize_aware], or omit "
            "--precision-search.",
        )
    if config.quantize_aware.teacher == "recipe" and not config.recipe:
        raise ConfigError(
            "Quantize-aware training has no teacher: this student has no recipe that names one.",
            remedy='Set teacher = "student" under [quantize_aware]: the float32 student is then its own teacher. Or '
            "name a recipe.",
        )


def quantize_aware(
    trained: TrainedStudent,
    fused: Step[FusedFiles],
    model: Step[OnnxModel],
    form: str,
    calibration: Calibration,
    lesson: Lesson,
) -> Step[QuantizeAwareFiles]:
    """The folded student, trained as its int8 graph in ``form``: its weights and the ranges for the cast.

    A run that was interrupted continues from its last epoch.
    """

    def make(making: Making) -> None:
        from kdexport.graph.quantize import parse_form, quantize

        folder, workspace = making.folder, making.workspace
        plain, ranges = folder / _START, folder / _START_RANGES
        _start(model.result(workspace).path, calibration, form, plain, ranges)
        quantize(plain, ranges, folder / _PLAIN, form=parse_form(form), weight_bits=weight_bits(form, calibration))
        job = {
            "float32": str(plain),
            "quantized": str(folder / _PLAIN),
            "ranges": str(ranges),
            "weight_bits": weight_bits(form, calibration),
            "student": str(trained.weights.parent),
            "dataset": asdict(calibration.dataset),
            "settings": lesson.to_json(),
            "recipe": lesson.recipe,
            "overrides": lesson.overrides,
        }
        (folder / _JOB).write_text(json.dumps(job), encoding="utf-8")
        lesson.train(folder / _JOB, folder / _RUN)
        _collect(folder, load_tensors(fused.result(workspace).weights), plain, ranges)

    settings = lesson.to_json()
    return Step(
        stage="quantize-aware",
        made_of=(
            fused, model, calibrate(model, calibration, form), form, weight_bits(form, calibration), settings,
            list(lesson.material), calibration.dataset_sha256, trained.weights_sha256,
        ),
        make=make,
        read=lambda folder: QuantizeAwareFiles(
            weights=folder / _STATE,
            model=OnnxModel(path=folder / MODEL, form="fp32"),
            ranges=folder / RANGES,
            described={**settings, **json.loads((folder / _HISTORY).read_text())},
        ),
        tools=(*CAST_TOOLS, "torch", "accelerate"),
        resumable=True,
    )  # fmt: skip


def _start(exported: Path, calibration: Calibration, form: str, path: Path, ranges: Path) -> None:
    """Write the graph that the training starts from, and its ranges: the same function, with channels of like ranges.

    Otherwise a channel that a fold made thousands of times larger than its neighbours leaves them without levels, and
    hardly a gradient either.
    """
    import itertools

    import numpy as np
    import onnx

    from kdexport.backends.base import INPUT
    from kdexport.graph.equalise import equalise

    images = np.concatenate(list(itertools.islice(calibration.batches(), _EQUALISED_ON)))
    onnx.save(equalise(onnx.load(str(exported)), {INPUT: images}, through_pooling=True).model, str(path))
    write_ranges(path, calibration, form, ranges)


def _collect(folder: Path, state: dict[str, Any], plain: Path, ranges: Path) -> None:
    """Write the trained state, the float32 graph that has it and its ranges; remove what only the run needs."""
    import shutil

    import onnx

    from kdexport.graph.trained_weights import trained_state, with_weights

    run, before = folder / _RUN, onnx.load(str(plain))
    after = trained_state(state, before, load_tensors(run / _TRAINED))
    save_tensors(folder / _STATE, after)
    onnx.save(with_weights(before, {name: value.numpy() for name, value in after.items()}), str(folder / MODEL))
    found = json.loads(ranges.read_text()) | json.loads((run / _TRAINED_RANGES).read_text())
    (folder / RANGES).write_text(json.dumps(dict(sorted(found.items())), indent=0))
    last = json.loads((run / _METRICS).read_text())["history"][-1]
    (folder / _HISTORY).write_text(json.dumps({"loss": last["loss/kd"], "top1": last["top1"]}))
    shutil.rmtree(run)
    for name in (_PLAIN, _JOB, _START, _START_RANGES):
        (folder / name).unlink()


def cast_trained(made: Step[QuantizeAwareFiles], form: str, calibration: Calibration) -> Step[OnnxModel]:
    """The trained student in the int8 ``form``, with the ranges of its training."""

    def make(making: Making) -> None:
        from kdexport.graph.quantize import parse_form, quantize

        files, path = made.result(making.workspace), making.folder / MODEL
        bits = weight_bits(form, calibration)
        quantize(files.model.path, files.ranges, path, form=parse_form(form), weight_bits=bits)
        copy_ranges(files.ranges, making.folder)

    return Step(
        stage="cast",
        made_of=(made, form, weight_bits(form, calibration)),
        make=make,
        read=lambda folder: OnnxModel(path=folder / MODEL, form=form),
        tools=CAST_TOOLS,
    )


def int8_forms(targets: Sequence[Target]) -> tuple[str, ...]:
    """The int8 forms of ``targets``, each once: every one is trained as its own graph."""
    return tuple(dict.fromkeys(target.form for target in targets if is_int8(target.form)))
