"""The checkpoint of a trained student: a folder with student.json and model.safetensors."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kdexport.checkpoint import StudentSpec, save_checkpoint, save_program_checkpoint
from kdexport.core.files import write_folder
from kdexport.data.datasets import ImageSet
from kdexport.data.preprocessing import Preprocessing
from kdexport.reparam.blocks import BranchSpec
from kdexport.reparam.branches import ParallelBranches
from kdexport.reparam.program import original_graph
from kdexport.students import Student
from training.data import preprocessing_of
from training.foreign.network import ForeignStudent
from training.recipe import Recipe
from training.runs.loop import Metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Digests of the inputs of a run, for the provenance of its student."""

    dataset_sha256: str
    teacher_sha256: str
    #: The numbers of epochs for which the run was planned before it was extended.
    extended_from: tuple[int, ...] = ()


def hand_over(final: Path, student: Student, spec: StudentSpec) -> None:
    """Write the checkpoint of ``student`` to ``final``, atomically replacing an older one.

    A student of another origin is stored with its program, so that a build does not need the code that made it. Its
    branches are a part of the program, where the build finds and folds them.
    """
    if not isinstance(student, ForeignStudent):
        write_folder(final, lambda folder: save_checkpoint(folder, student, spec))
        return
    # A copy, because the student is trained further on its device.
    network = copy.deepcopy(student.network).cpu().eval()
    for module in network.modules():
        if isinstance(module, ParallelBranches):
            for branch in module.branches:
                # Those of the training, which reads every branch; an exported program has no hooks.
                branch._forward_hooks.clear()
    graph = original_graph(network, torch.zeros(2, 3, spec.image_size, spec.image_size))
    write_folder(final, lambda folder: save_program_checkpoint(folder, graph, replace(spec, branches=None)))


def student_spec(
    recipe: Recipe, train: ImageSet, branches: BranchSpec | None, metrics: Metrics, origin: Origin
) -> StudentSpec:
    """The description of a student of ``recipe`` in its checkpoint; ``metrics`` are a part of its provenance."""
    # Paths of the training machine do not affect the weights, and are not published.
    described = recipe.model_dump(mode="json")
    described["data"].pop("root")
    described["teacher"].pop("checkpoint")
    if "weights" in described["student"]:
        described["student"]["weights"] = Path(described["student"]["weights"]).name
    if described["teacher"]["name"].endswith(".pt2"):
        described["teacher"]["name"] = Path(described["teacher"]["name"]).name
    if described["data"]["name"].startswith("folder:"):
        described["data"]["name"] = "folder"
    preprocessing: Preprocessing = preprocessing_of(recipe.data)
    return StudentSpec(
        student=recipe.student.name,
        classes=train.classes,
        preprocessing=preprocessing,
        branches=branches,
        form=recipe.student.form,
        provenance={
            "recipe": described,
            "dataset_sha256": origin.dataset_sha256,
            **({"dataset_split": train.drawn} if train.drawn else {}),
            "teacher_sha256": origin.teacher_sha256,
            "seed": recipe.train.seed,
            **({"extended_from": list(origin.extended_from)} if origin.extended_from else {}),
            "metrics": metrics,
        },
    )
