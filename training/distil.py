"""One run from recipe to student: claims its folder, trains the teacher where it has no weights, then distils."""

from pathlib import Path

from kdexport.checkpoint import sha256_file
from kdexport.fingerprint import dataset_digest
from training.loop import Metrics
from training.recipe import Recipe
from training.record import claim, device_name, note_environment
from training.rehearsal import rehearse
from training.train import Origin, make_accelerator, train_student, train_teacher


def prepare_teacher(recipe: Recipe, directory: Path) -> Recipe:
    """``recipe`` with the weights of its teacher, trained into ``directory`` unless it names or holds them."""
    if recipe.teacher.checkpoint:
        return recipe
    weights = directory / "model.safetensors"
    if not weights.is_file():
        train_teacher(recipe, directory)
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"checkpoint": str(weights)})})


def distil(recipe: Recipe, directory: Path, teacher_directory: Path | None = None) -> Metrics:
    """Run ``recipe`` in ``directory``, continuing what is there; returns the metrics of the last epoch.

    A teacher without weights is trained in ``teacher_directory``, or else in the run's own folder.
    """
    rehearse(recipe)
    accelerator = make_accelerator(recipe.train)
    with accelerator.main_process_first():
        claim(directory, recipe, "student")
        dataset = dataset_digest(recipe.data.spec(), directory / "dataset")
    if accelerator.is_main_process:
        note_environment(directory, device_name(), accelerator.num_processes)
    resolved = prepare_teacher(recipe, teacher_directory or directory / "teacher")
    checkpoint = Path(resolved.teacher.checkpoint)
    digest = sha256_file(checkpoint) if checkpoint.is_file() else ""
    return train_student(resolved, directory, Origin(dataset_sha256=dataset, teacher_sha256=digest))
