"""The directory in which a trained student is handed over: student.json and model.safetensors, written whole."""

from dataclasses import dataclass
from pathlib import Path

from kdexport.checkpoint import StudentSpec, save_checkpoint
from kdexport.core.files import write_folder
from kdexport.data.datasets import ImageSet
from kdexport.data.preprocessing import Preprocessing
from kdexport.reparam.blocks import BranchSpec
from kdexport.students import Student
from training.data import preprocessing_of
from training.recipe import Recipe
from training.runs.loop import Metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a run's inputs come from, as digests: part of the provenance of its student."""

    dataset_sha256: str
    teacher_sha256: str


def hand_over(final: Path, student: Student, spec: StudentSpec) -> None:
    """Write a student's checkpoint, which appears whole in the place of an older one."""
    write_folder(final, lambda folder: save_checkpoint(folder, student, spec))


def student_spec(
    recipe: Recipe, train: ImageSet, branches: BranchSpec | None, metrics: Metrics, origin: Origin
) -> StudentSpec:
    """What a student of ``recipe`` says about itself; its provenance has ``metrics``."""
    # Places on the training machine tell nothing about the weights and do not leave it.
    described = recipe.model_dump(mode="json")
    described["data"].pop("root")
    described["teacher"].pop("checkpoint")
    if described["data"]["name"].startswith("folder:"):
        described["data"]["name"] = "folder"
    preprocessing: Preprocessing = preprocessing_of(recipe.data)
    return StudentSpec(
        student=recipe.student.name,
        classes=train.classes,
        preprocessing=preprocessing,
        branches=branches,
        provenance={
            "recipe": described,
            "dataset_sha256": origin.dataset_sha256,
            "teacher_sha256": origin.teacher_sha256,
            "seed": recipe.train.seed,
            "metrics": metrics,
        },
    )
