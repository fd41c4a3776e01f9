"""One run from recipe to student: claims its folder, trains the teacher where it has no weights, then distils."""

from pathlib import Path

from kdexport.checkpoint import sha256_file
from kdexport.fingerprint import dataset_digest
from training.loop import Metrics
from training.recipe import Recipe
from training.record import claim, device_name, note_environment
from training.rehearsal import rehearse
from training.train import Origin, make_accelerator, train_student, train_teacher


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
