"""Reading photos at 224 pixels, for training and for evaluation, beside the loader of torchvision's examples.

python benchmarks/loader_speed.py --to docs/results/loader.md [--rounds 12] [--images 256] [--workers 2]

Every image is drawn: noise of all scales, 500x375 pixels, JPEG of quality 90, about as much to decode as a photo.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from training_arms import cpu_seconds
from training_report import machine
from training_speed import interval

from kdexport.data.datasets import open_dataset
from training.data import EvaluationBatches, training_batches
from training.recipe import DataSettings

SIZE, RESIZE, BATCH, CLASSES = 224, 256, 32, 4
WIDTH, HEIGHT = 500, 375
GOAL = 0.9
TRAINING, EVALUATION = "training", "evaluation"
#: Seconds of one epoch: by the clock, and of the processors.
Epoch = Callable[[], tuple[float, float]]


def draw_photos(folder: Path, images: int) -> None:
    """Write ``images`` JPEG files of noise with a spectrum of 1/f into the classes of the splits train and test."""
    rng = np.random.default_rng(0)
    rows, columns = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    falling = 1 / np.maximum(np.hypot(rows, columns), 1 / WIDTH)
    for split in ("train", "test"):
        for index in range(images):
            spectrum = np.fft.rfft2(rng.standard_normal((3, HEIGHT, WIDTH))) * falling
            values = np.fft.irfft2(spectrum, s=(HEIGHT, WIDTH))
            pixels = np.clip(128 + 48 * values / values.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)
            place = folder / split / f"class{index % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{index:05}.jpg", quality=90)


def timed(batches: Callable[[], Iterable[object]]) -> Epoch:
    """Reads all batches that ``batches`` gives; starting workers is part of the time, as it is of each epoch."""

    def epoch() -> tuple[float, float]:
        started, used = time.perf_counter(), cpu_seconds()
        for _ in batches():
            pass
        return time.perf_counter() - started, cpu_seconds() - used

    return epoch


def reference(folder: Path, workers: int) -> dict[str, Epoch]:
    """The loaders of torchvision's example for classification, with their default transforms."""
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    changes = {
        TRAINING: [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()],
        EVALUATION: [transforms.Resize(RESIZE), transforms.CenterCrop(SIZE)],
    }
    found: dict[str, Epoch] = {}
    for what, split in ((TRAINING, "train"), (EVALUATION, "test")):
        steps = transforms.Compose([*changes[what], transforms.PILToTensor(), _ToFloat(), normalise])
        loader = DataLoader(
            ImageFolder(str(folder / split), steps),
            batch_size=BATCH,
            shuffle=what == TRAINING,
            num_workers=workers,
            persistent_workers=True,
        )
        found[what] = timed(lambda loader=loader: loader)  # type: ignore[misc]
    return found


class _ToFloat:
    """Convert uint8 to float32 in 0 to 1, as a class, because workers need it to be picklable."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        converted: torch.Tensor = transforms.functional.convert_image_dtype(image, torch.float32)
        return converted


def ours(folder: Path, workers: int) -> dict[str, Epoch]:
    """The loaders of this project with the same crops, flips and normalisation."""
    settings = DataSettings(
        name=f"folder:{folder}", root=str(folder), image_size=SIZE, resize=RESIZE, crop="resized",
        crop_scale=(0.08, 1.0), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), workers=workers,
    )  # fmt: skip
    device = torch.device("cpu")
    train, test = (open_dataset(settings.spec(), split) for split in ("train", "test"))
    batches = training_batches(train, settings, batch_size=BATCH, seed=0, device=device)
    evaluation = EvaluationBatches(test, settings, device=device, batch_size=BATCH)
    epochs = iter(range(10_000))
    return {TRAINING: timed(lambda: batches.epoch(next(epochs))), EVALUATION: timed(lambda: evaluation)}


def measure(rounds: int, images: int, workers: int) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Seconds of an epoch by what is read and by arm, one value a round, both arms one after the other."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        draw_photos(folder, images)
        arms = {"reference": reference(folder, workers), "ours": ours(folder, workers)}
        seconds: dict[str, dict[str, list[tuple[float, float]]]] = {
            what: {name: [] for name in arms} for what in (TRAINING, EVALUATION)
        }
        for what in seconds:
            for epochs in arms.values():
                epochs[what]()
            for index in range(rounds):
                names = list(arms) if index % 2 else list(arms)[::-1]
                for name in names:
                    seconds[what][name].append(arms[name][what]())
                print(what, {name: seconds[what][name][-1] for name in arms}, file=sys.stderr, flush=True)
    return seconds


def page(seconds: dict[str, dict[str, list[tuple[float, float]]]], images: int, workers: int) -> str:
    """The page of results."""
    rounds = len(seconds[TRAINING]["ours"])
    lines = [
        "# Reading photos",
        "",
        f"    python benchmarks/loader_speed.py --rounds {rounds} --images {images} --workers {workers} \\",
        "        --to docs/results/loader.md",
        "",
        f"Machine: {machine()}. {images} JPEG files of {WIDTH}x{HEIGHT} pixels (noise of all scales, quality 90) are",
        f"read as batches of {BATCH} images of {SIZE} pixels. The reference are `ImageFolder` and `DataLoader` with",
        f"{workers} workers and the transforms of torchvision's example; ours has {workers} threads. Nothing is",
        f"trained meanwhile. Both arms take turns for {rounds} rounds; ratios are within a round, geometric mean and",
        f"95 % interval. The goal is at least {GOAL}.",
        "",
        "| what | images/s, ours / reference | goal | processor time, reference / ours | images/s, reference | ours |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for what, arms in seconds.items():
        pairs = list(zip(arms["reference"], arms["ours"], strict=True))
        speed = interval([theirs[0] / own[0] for theirs, own in pairs])
        work = interval([theirs[1] / own[1] for theirs, own in pairs])
        verdict = "met" if speed[1] >= GOAL else "missed" if speed[2] < GOAL else "undecided"
        rates = " | ".join(f"{images / float(np.median([s for s, _ in arms[name]])):.0f}" for name in arms)
        lines.append(f"| {what} | {_shown(speed)} | {verdict} | {_shown(work)} | {rates} |")
    return "\n".join([*lines, ""])


def _shown(estimate: tuple[float, float, float]) -> str:
    return f"{estimate[0]:.2f} ({estimate[1]:.2f} to {estimate[2]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = page(measure(arguments.rounds, arguments.images, arguments.workers), arguments.images, arguments.workers)
    arguments.to.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
