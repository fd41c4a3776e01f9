"""Quantize-aware training: the folded student is trained further as the int8 graph that a target will run.

Its teacher, the recipe's or the float32 student itself, sees the same images. What is trained are the weights of int8
layers and the ends of the ranges of activations; which tensors are rounded, and how, is read from the int8 file of the
cast (``kdexport.graph.fake_quantized``).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from kdexport.checkpoint import load_student, open_checkpoint, save_tensors
from kdexport.core.files import write_text
from kdexport.core.progress import Reporter
from kdexport.data.datasets import DatasetSpec, ImageSet, open_dataset
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import DataError, TrainingError
from kdexport.graph.fake_quantized import FakeQuantized
from kdexport.graph.tensor_ranges import read_ranges
from kdexport.reparam.fold_student import fuse_student
from kdexport.students import Tapped
from training.data import EvaluationBatches, training_batches
from training.devices import nondeterminism_named
from training.distillers.distiller import StepContext
from training.losses import kd_loss
from training.networks import given_teacher
from training.recipe import DataSettings, Recipe, TrainSettings, load_recipe
from training.runs.loop import Metrics, Run, run
from training.runs.step import Teach
from training.runs.supervision import Supervision
from training.runs.task import StepResult
from training.train import freeze, make_accelerator

#: The files of a finished run; the second has the ranges by which the graph is cast again.
WEIGHTS, TRAINED_RANGES, METRICS = "trained.safetensors", "trained_ranges.json", "quantize_aware.json"
#: A run on a folder of images without a recipe shifts them by up to this part of their side, and does no more.
_SHIFT = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeAwareJob:
    """What a run reads: the graphs before and after the cast, the student's checkpoint, images, teacher and schedule.

    Without a ``recipe`` the float32 student is the teacher.
    """

    float32: Path
    quantized: Path
    ranges: Path
    weight_bits: int
    student: Path
    dataset: DatasetSpec
    settings: dict[str, Any]
    recipe: str
    overrides: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "QuantizeAwareJob":
        """The job that ``kdexport build`` wrote as JSON."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            float32=Path(data["float32"]),
            quantized=Path(data["quantized"]),
            ranges=Path(data["ranges"]),
            weight_bits=int(data["weight_bits"]),
            student=Path(data["student"]),
            dataset=DatasetSpec(**data["dataset"]),
            settings=dict(data["settings"]),
            recipe=str(data["recipe"]),
            overrides=dict(data["overrides"]),
        )


class QuantizeAwareTask(nn.Module):
    """One step: the divergence of the int8 graph from its teacher, and a part of cross-entropy."""

    def __init__(self, network: FakeQuantized, *, temperature: float, cross_entropy: float) -> None:
        super().__init__()
        self.network = network
        self._temperature, self._weight, self._supervision = temperature, cross_entropy, Supervision()

    def forward(self, images: Tensor, teacher: Tapped, step: StepContext) -> StepResult:
        logits = self.network(images)
        losses = {"kd": kd_loss(logits, teacher.logits, self._temperature)}
        if self._weight > 0:
            losses["cross_entropy"] = self._weight * self._supervision(logits, step)
        return StepResult(losses, logits)


def train_quantize_aware(job: QuantizeAwareJob, directory: Path) -> Metrics:
    """Train in ``directory`` or continue there; returns the metrics of the last epoch.

    Raises ``ReparamError`` for a graph that cannot be trained, ``DataError`` without enough training images.
    """
    settings, trained = job.settings, open_checkpoint(job.student)
    schedule = TrainSettings(
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        schedule="cosine",
        optimizer="adamw",
        weight_decay=0.0,
        warmup_epochs=min(0.1, 0.1 * settings["epochs"]),
        mixed_precision="no",
        seed=settings["seed"],
        compile="no",
        capture="no",
    )
    accelerator = make_accelerator(schedule)
    network = FakeQuantized(
        onnx.load(str(job.quantized)), onnx.load(str(job.float32)), read_ranges(job.ranges),
        weight_bits=job.weight_bits,
    )  # fmt: skip
    recipe = load_recipe(job.recipe, job.overrides) if job.recipe else None
    train, test = (open_dataset(job.dataset, split) for split in ("train", "test"))
    if len(train) < schedule.batch_size:
        raise DataError(
            f"Quantize-aware training has {len(train)} training images, fewer than one batch of {schedule.batch_size}.",
            remedy="Lower batch_size under [quantize_aware], or add images.",
        )
    data = data_settings(job.dataset, trained.spec.preprocessing, recipe)
    task = QuantizeAwareTask(network, temperature=settings["temperature"], cross_entropy=settings["cross_entropy"]).to(
        accelerator.device
    )
    batches = training_batches(
        train, data, batch_size=schedule.batch_size, seed=schedule.seed, device=accelerator.device,
        rank=accelerator.process_index, world=accelerator.num_processes,
    )  # fmt: skip
    teach = _teacher(job, recipe, train, data, accelerator.device)
    made = Run(
        directory=directory,
        title=f"quantize-aware {trained.spec.student}",
        settings=schedule,
        branches=(0, 1),
        task=task,
        network=network,
        batches=batches,
        evaluation=EvaluationBatches(
            test, data, device=accelerator.device, batch_size=64, preprocessing=trained.spec.preprocessing,
            rank=accelerator.process_index, world=accelerator.num_processes,
        ),
        teach=teach,
        draws=False,
    )  # fmt: skip
    try:
        with nondeterminism_named():
            history = run(made, accelerator)
    except TrainingError as error:
        remedy = "Lower learning_rate under [quantize_aware]."
        raise TrainingError(f"Quantize-aware training: {error.message}", remedy=remedy) from error
    if accelerator.is_main_process:
        _write(directory, network, history)
    accelerator.wait_for_everyone()
    return history[-1]


def data_settings(dataset: DatasetSpec, preprocessing: Preprocessing, recipe: Recipe | None) -> DataSettings:
    """The student's own preprocessing with the augmentation of its recipe; without one, images are only shifted."""
    own: dict[str, Any] = {
        "image_size": preprocessing.image_size,
        "resize": preprocessing.resize,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": preprocessing.interpolation,
        "fit": preprocessing.fit,
        "orientation": preprocessing.orientation,
        "background": "ignore" if preprocessing.background is None else preprocessing.background,
    }
    if recipe is None:
        shift = max(1, preprocessing.image_size // _SHIFT)
        plain = DataSettings(name=dataset.name, crop="padded", crop_padding=shift, flip=False)
        return plain.model_copy(update={**own, "root": dataset.root})
    return recipe.data.model_copy(update=own)


def _teacher(
    job: QuantizeAwareJob, recipe: Recipe | None, train: ImageSet, data: DataSettings, device: torch.device
) -> Teach:
    if recipe is not None and job.settings["teacher"] == "recipe":
        # The images are normalised as the student's; a teacher with other statistics gets its own.
        recipe = recipe.model_copy(update={"data": data})
        return freeze(given_teacher(recipe, train, Reporter().say), recipe, device)
    student = fuse_student(load_student(open_checkpoint(job.student))).module.to(device).eval()

    @torch.no_grad()
    def teach(images: Tensor) -> Tapped:
        logits = student(images)
        return Tapped(features={}, preactivations={}, pooled=logits, logits=logits)

    return teach


def _write(directory: Path, network: FakeQuantized, history: tuple[Metrics, ...]) -> None:
    tensors = {name: torch.from_numpy(np.array(values)) for name, values in network.trained_weights().items()}
    save_tensors(directory / WEIGHTS, tensors)
    ranges = {name: [found.low, found.high] for name, found in network.trained_ranges().items()}
    write_text(directory / TRAINED_RANGES, json.dumps(dict(sorted(ranges.items())), indent=0))
    write_text(directory / METRICS, json.dumps({"history": list(history)}, indent=1))
