"""Trains small networks with the loop, alone or as one of several processes; each writes what it ended with."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kdexport.checkpoint import save_tensors
from kdexport.data import ImageSet
from training.data import EvaluationBatches, ResidentBatches
from training.loop import Run, run
from training.recipe import DataSettings, TrainSettings
from training.task import SupervisedTask
from training.teachers import TEACHERS
from training.train import make_accelerator

IMAGE_SIZE, CLASSES = 12, 3


def build(kind: str) -> nn.Module:
    """``plain`` has no batch norm, so that its gradient is a mean over images."""
    torch.manual_seed(4)
    if kind == "batchnorm":
        return TEACHERS.build("resnet8", num_classes=CLASSES, image_size=IMAGE_SIZE)
    layers = (nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES))
    return nn.Sequential(*layers)


def main(out: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 40)
    pixels = rng.integers(0, 150, (40, IMAGE_SIZE, IMAGE_SIZE, 3))
    pixels[np.arange(40), :, :, labels] += 60
    images = ImageSet(classes=tuple("abc"), labels=labels, pixels=pixels.astype(np.uint8), files=())
    data = DataSettings(name="digits", image_size=IMAGE_SIZE, crop_padding=2)
    settings = TrainSettings(epochs=3, batch_size=8, learning_rate=0.1, mixed_precision="no", warmup_epochs=1.0)
    accelerator = make_accelerator(settings)
    rank, device = accelerator.process_index, accelerator.device
    network = build(kind).to(device)
    batches = ResidentBatches(
        images, data, batch_size=8, seed=settings.seed, device=device, rank=rank, world=accelerator.num_processes
    )
    job = Run(
        directory=out,
        title=kind,
        settings=settings,
        branches=(0, 1),
        task=SupervisedTask(network),
        network=network,
        batches=batches,
        evaluation=EvaluationBatches(images, data, device=device),
        teach=lambda _: None,
    )
    run(job, accelerator)
    save_tensors(out / f"rank{rank}.safetensors", network.state_dict())


if __name__ == "__main__":
    for name in ("plain", "batchnorm"):
        main(Path(sys.argv[1]) / name, name)
