"""Runs the training package in a child process; its results are folders, stored by the digest of their inputs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdexport.core.child import ChildDiedError, call, call_together
from kdexport.core.digests import digest
from kdexport.core.training_process import training_environment
from kdexport.errors import TrainingError


def resolve_recipe(recipe: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """``{"revision": int, "recipe": {...}, "plugins": {...}}``: the complete recipe after its base and ``overrides``.

    ``plugins`` has the sha256 of the source of each plugin that defines the recipe's student, teacher or distiller.
    """
    return dict(_call(["resolve", "--recipe", recipe, *_as_options(overrides)]))


def propose_recipe(data: str, student: str, image_size: int | None) -> dict[str, Any]:
    """``{"base": str, "tables": {...}, "summary": str}``: a recipe for the folder of images ``data`` over a base."""
    sized = [] if image_size is None else ["--image-size", str(image_size)]
    return dict(_call(["propose", "--data", data, "--student", student, *sized]))


def train_teacher(recipe: str, overrides: dict[str, Any], out: Path, *, processes: int) -> None:
    """Train the recipe's teacher into ``out``/model.safetensors; a run that was interrupted there continues."""
    _call(["teacher", "--recipe", recipe, *_as_options(overrides), "--out", str(out)], processes=processes)


def train_student(recipe: str, overrides: dict[str, Any], out: Path, *, processes: int) -> None:
    """Distil the recipe's student into ``out``/student; a run that was interrupted there continues."""
    _call(["train", "--recipe", recipe, *_as_options(overrides), "--out", str(out)], processes=processes)


def train_quantize_aware(job: Path, out: Path, *, processes: int) -> None:
    """Train the int8 graph of ``job``, a JSON file, into ``out``; a run that was interrupted there continues."""
    _call(["quantize-aware", str(job), "--out", str(out)], processes=processes)


def student_key(
    recipe: dict[str, Any], dataset_sha256: str, teacher_sha256: str, revision: int, plugins: Mapping[str, str]
) -> str:
    """Digest of all that a distilled student depends on; ``plugins`` are those of ``resolve_recipe``."""
    return digest(["train", portable(recipe), dataset_sha256, teacher_sha256, revision, *sorted(plugins.items())])


def teacher_key(recipe: dict[str, Any], dataset_sha256: str, revision: int, plugins: Mapping[str, str]) -> str:
    """Digest of all that the recipe's teacher depends on."""
    tables = {name: table for name, table in portable(recipe).items() if name in ("data", "teacher", "train")}
    # The epochs and the learning rate of the student do not change the teacher, nor does how it is used afterwards.
    tables["train"] = {name: v for name, v in tables["train"].items() if name not in ("epochs", "learning_rate")}
    tables["train"]["teacher_precision"] = "auto"
    tables["teacher"] = {name: v for name, v in tables["teacher"].items() if name not in ("plausibility", "taps")}
    source = [plugins["teacher"]] if "teacher" in plugins else []
    return digest(["teacher", tables, dataset_sha256, revision, *source])


def portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without paths and trackers: data and weights count by their digests, wherever they are stored."""
    data = {name: value for name, value in recipe["data"].items() if name not in ("root", "workers")}
    data["name"] = data["name"].partition(":")[0]
    teacher = {name: value for name, value in recipe["teacher"].items() if name != "checkpoint"}
    train = {name: value for name, value in recipe["train"].items() if name != "trackers"}
    return {**recipe, "data": data, "teacher": teacher, "train": train}


def _call(arguments: list[str], *, processes: int = 1) -> Any:
    try:
        # Training has no time limit, and shows its progress on stderr.
        environment = training_environment()
        if processes > 1:
            return call_together("training", arguments, processes, environment)
        return call("training", arguments, timeout_s=None, environment=environment, shows_stderr=True)
    except ChildDiedError as error:
        raise TrainingError(
            f"The training process ended with exit code {error.exit_code}.",
            remedy="See its output above. Run the same command again to continue from the last finished epoch.",
        ) from None


def _as_options(tables: dict[str, Any], prefix: str = "") -> list[str]:
    options: list[str] = []
    for key, value in tables.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            options += _as_options(value, f"{name}.")
        else:
            # JSON scalars and arrays of them are valid TOML values.
            options += ["--set", f"{name}={json.dumps(value)}"]
    return options
