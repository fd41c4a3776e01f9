"""Train small networks with the loop, alone or as one of several processes; each process writes its final state.

python several_processes.py DIR [arguments of `python -m training`, which is run last]
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.checkpoint import save_tensors
from kdexport.data.datasets import ImageSet
from kdexport.errors import ConfigError
from kdexport.students import Stage, Student, Tap
from training.__main__ import app
from training.data import EvaluationBatches, ResidentBatches
from training.distillers import DISTILLERS
from training.distillers.settings import settings_model
from training.recipe import DataSettings, TrainSettings
from training.runs.loop import Run, run
from training.runs.step import Teach
from training.runs.task import DistillationTask, FrozenTeacher, SupervisedTask
from training.teachers import TEACHERS, Teacher
from training.train import make_accelerator

IMAGE_SIZE, CLASSES, COUNT = 12, 3, 43
#: Fewer negatives than candidates, so that the random draw matters.
SETTINGS: dict[str, dict[str, object]] = {
    "kd": {"cross_entropy": 1.0, "weight": 0.4},
    "crd": {"negatives": 9, "dimension": 5, "weight": 0.3, "momentum": 0.4},
}
KINDS = ("plain", "batchnorm", *SETTINGS)


class Plain(Student, Teacher):
    """Without batch norm, so that its gradient is a mean over images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, width, 3, 2), nn.Linear(4 * width, CLASSES)
        taps = [Tap(name="stage1", channels=width, stride=2)]
        sizes = {"num_classes": CLASSES, "image_size": IMAGE_SIZE}
        self.describe(**sizes, taps=taps, hosts=(), classifier_path="linear")

    def advance(self, index: int, x: Tensor) -> Stage:
        return Stage.rectified(self.conv(x))

    def pool(self, feature: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(feature, 2).flatten(1)

    def predict(self, pooled: Tensor) -> Tensor:
        return self.linear(pooled)  # type: ignore[no-any-return]


def build(kind: str, labels: Tensor) -> tuple[nn.Module, nn.Module, Teach]:
    """The network, the task that trains it and its teacher."""
    torch.manual_seed(4)
    if kind not in SETTINGS:
        batch_norm = kind == "batchnorm"
        network = TEACHERS.build("resnet8", num_classes=CLASSES, image_size=IMAGE_SIZE) if batch_norm else Plain(8)
        return network, SupervisedTask(network), lambda _: None
    student, teacher = Plain(8), Plain(6)
    settings = settings_model(kind).model_validate({"name": kind, **SETTINGS[kind]})
    distiller = DISTILLERS.build(kind, settings=settings, student=student, teacher=teacher)
    distiller.prepare(labels)
    return student, DistillationTask(student, distiller, {}), FrozenTeacher(teacher, torch.device("cpu"), None)


def data() -> ImageSet:
    rng = np.random.default_rng(0)
    labels = rng.choice(CLASSES, COUNT, p=(0.5, 0.3, 0.2))
    pixels = rng.integers(0, 150, (COUNT, IMAGE_SIZE, IMAGE_SIZE, 3))
    pixels[np.arange(COUNT), :, :, labels] += 60
    return ImageSet(classes=tuple("abc"), labels=labels, pixels=pixels.astype(np.uint8), files=())


def main(out: Path, kind: str) -> None:
    images, described = data(), DataSettings(name="digits", image_size=IMAGE_SIZE, crop_padding=2)
    settings = TrainSettings(epochs=3, batch_size=8, learning_rate=0.1, mixed_precision="no", warmup_epochs=1.0)
    accelerator = make_accelerator(settings)
    rank, device = accelerator.process_index, accelerator.device
    network, task, teach = build(kind, torch.from_numpy(images.labels))
    batches = ResidentBatches(
        images, described, batch_size=8, seed=settings.seed, device=device, rank=rank, world=accelerator.num_processes
    )
    job = Run(
        directory=out,
        title=kind,
        settings=settings,
        branches=(0, 1),
        task=task.to(device),
        network=network,
        batches=batches,
        evaluation=EvaluationBatches(images, described, device=device),
        teach=teach,
    )
    run(job, accelerator)
    save_tensors(out / f"rank{rank}.safetensors", task.state_dict())


def refuse(out: Path) -> None:
    """Request a batch that two processes cannot share evenly, and write the resulting error."""
    try:
        make_accelerator(TrainSettings(batch_size=9, mixed_precision="no"))
        answer = "accepted"
    except ConfigError as error:
        answer = str(error)
    (out / "uneven").write_text(answer)


def everything(root: Path) -> None:
    for kind in KINDS:
        main(root / kind, kind)
    refuse(root)


if __name__ == "__main__":
    everything(Path(sys.argv[1]))
    # In the same processes, because each takes seconds to start.
    app(sys.argv[2:])
