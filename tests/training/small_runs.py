"""A data set, a recipe and a child process that are small enough for a training run in a test."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from training.recipe import Recipe, load_recipe, merge_overrides, parse_override

CLASSES = ("ant", "bee", "cow")
#: Overrides of the recipe "digits"; the last of two for one key holds.
OVERRIDES = (
    "data.image_size=16",
    "data.flip=true",
    "teacher.epochs=1",
    "train.epochs=4",
    "train.batch_size=12",
    "train.mixed_precision=no",
    "distiller.ramp_epochs=1.5",
    "train.warmup_epochs=0.5",
    # A few steps on a few images do not make a teacher.
    "teacher.plausibility=reported",
)


def write_image_folders(root: Path) -> Path:
    """3 classes of 12 training and 6 test images of 16 to 32 pixels a side, told apart by their colour."""
    rng = np.random.default_rng(3)
    for split, count in (("train", 12), ("test", 6)):
        for channel, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (*rng.integers(16, 33, 2), 3))
                pixels[..., channel] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


def tiny_recipe(images: Path, *overrides: str) -> Recipe:
    """resnet8 teaches mobilenetv2 on ``images``."""
    texts = (f"data.name=folder:{images}", *OVERRIDES, *overrides)
    return load_recipe("digits", merge_overrides([parse_override(text) for text in texts]))


def arguments(images: Path, out: Path, *overrides: str) -> list[str]:
    """The command line ``train`` for ``tiny_recipe``."""
    texts = (f"data.name=folder:{images}", *OVERRIDES, *overrides)
    return ["train", "--recipe", "digits", "--out", str(out), *(part for text in texts for part in ("--set", text))]


def environment(**extra: str) -> dict[str, str]:
    """For child processes: without a GPU, and with threads that do not spin while they wait for a busy core."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE", **extra}


def start(command: list[str], **extra: str) -> subprocess.Popen[str]:
    """``python`` with ``command`` as a child in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """(stdout, stderr) of a child that must succeed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err
