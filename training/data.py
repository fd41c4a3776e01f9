"""Batches for training and evaluation: augmented, normalised, on the device; seed and epoch determine them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kdexport.data.datasets import ImageSet
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import DataError
from training.recipe import DataSettings

#: Decoded data sets up to this size are kept on the device; larger ones are streamed from their files.
_RESIDENT_BYTES = 4 * 2**30

#: Normalised images (B,3,S,S) and their classes (B,).
Labelled = tuple[Tensor, Tensor]


class Batch(NamedTuple):
    """Normalised images (B,3,S,S), their classes (B,) and their indices in the training set (B,)."""

    images: Tensor
    labels: Tensor
    samples: Tensor


def preprocessing_of(settings: DataSettings) -> Preprocessing:
    """The preprocessing of evaluation and production."""
    preprocessing = Preprocessing.for_new_student(
        image_size=settings.image_size,
        resize=settings.resize or settings.image_size,
        mean=settings.mean,
        std=settings.std,
    )
    return replace(
        preprocessing,
        interpolation=settings.interpolation,
        fit=settings.fit,
        orientation=settings.orientation,
        background=None if settings.background == "ignore" else settings.background,
    )


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The random generator of one epoch; it depends on seed and epoch only, so a resumed run draws the same numbers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


class Batches(Protocol):
    """Augmented training batches; process ``rank`` of ``world`` gets every ``world``-th image of a global batch."""

    steps: int

    def epoch(self, index: int) -> Iterator[Batch]:
        """The batches of epoch ``index``, on the device."""


class Normaliser:
    """Convert uint8 images (B,3,S,S) to normalised float32, channels last, on the device."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self._mean = mean.reshape(1, 3, 1, 1).to(device)
        self._std = std.reshape(1, 3, 1, 1).to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        normalised = (pixels.float() / 255 - self._mean) / self._std
        return normalised.contiguous(memory_format=torch.channels_last)


class _AugmentedBatches:
    """What both loaders have in common: the settings, and the part of each batch that this process gets."""

    def __init__(
        self,
        images: ImageSet,
        settings: DataSettings,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.steps = full_batches(len(images), batch_size)
        self._settings, self._device = settings, device
        self._preprocessing = preprocessing_of(settings)
        self._normalise = Normaliser(self._preprocessing, device)
        self._batch_size, self._seed, self._rank, self._world = batch_size, seed, rank, world
        self._load(images)

    def _load(self, images: ImageSet) -> None:
        raise NotImplementedError

    def _own_places(self, step: int) -> slice:
        """The positions, in the order of an epoch, of the images that this process gets in ``step``."""
        return slice(step * self._batch_size + self._rank, (step + 1) * self._batch_size, self._world)


class ResidentBatches(_AugmentedBatches):
    """A set of small images as one uint8 tensor on the device, where each batch is cropped and flipped at random."""

    def _load(self, images: ImageSet) -> None:
        padding = self._settings.crop_padding
        pixels = torch.from_numpy(decode_all(images, self._preprocessing)).permute(0, 3, 1, 2)
        self._pixels = torch.nn.functional.pad(pixels, (padding,) * 4).to(self._device).contiguous()
        self._labels = torch.from_numpy(images.labels).to(self._device)

    def epoch(self, index: int) -> Iterator[Batch]:
        """The batches of epoch ``index``, in random order, with random crop offsets and flips."""
        count, device = len(self._labels), self._pixels.device
        generator = epoch_generator(self._seed, index)
        order = torch.randperm(count, generator=generator)
        offsets = torch.randint(2 * self._settings.crop_padding + 1, (count, 2), generator=generator)
        flips = torch.rand(count, generator=generator) < (0.5 if self._settings.flip else 0.0)
        order, offsets, flips = order.to(device), offsets.to(device), flips.to(device)
        for step in range(self.steps):
            own = self._own_places(step)
            chosen = order[own]
            images = self._normalise(self._crop(chosen, offsets[own], flips[own]))
            yield Batch(images, self._labels[chosen], chosen)

    def _crop(self, chosen: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        span = torch.arange(self._settings.image_size, device=chosen.device)
        rows = offsets[:, :1] + span
        columns = offsets[:, 1:] + torch.where(flips[:, None], span.flip(0), span)
        channels = torch.arange(3, device=chosen.device)
        return self._pixels[
            chosen[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None], columns[:, None, None]
        ]


class StreamedBatches(_AugmentedBatches):
    """Images that are too many or too large for the device: threads decode, crop, resize and flip them at random."""

    def _load(self, images: ImageSet) -> None:
        self._images, self._labels = images, torch.from_numpy(images.labels)

    def epoch(self, index: int) -> Iterator[Batch]:
        """The batches of epoch ``index``, in random order; the next batch is decoded while the current one is used."""
        order = torch.randperm(len(self._labels), generator=epoch_generator(self._seed, index)).numpy()
        batches = [order[self._own_places(step)] for step in range(self.steps)]
        with ThreadPoolExecutor(max(self._settings.workers, 1)) as pool:
            pending = [pool.submit(self._augmented, int(i), index) for i in batches[0]]
            for step, batch in enumerate(batches):
                ready, pending = pending, []
                if step + 1 < self.steps:
                    pending = [pool.submit(self._augmented, int(i), index) for i in batches[step + 1]]
                pixels = torch.from_numpy(np.stack([item.result() for item in ready])).permute(0, 3, 1, 2)
                samples = torch.from_numpy(batch)
                labels = self._labels[samples].to(self._device)
                yield Batch(self._normalise(pixels.to(self._device)), labels, samples.to(self._device))

    def _augmented(self, sample: int, epoch: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        from PIL import Image

        image = self._preprocessing.rgb(self._images.image(sample))
        # One seed for each image, because the order in which threads run is not repeatable.
        rng = np.random.default_rng((self._seed, epoch, sample))
        top, left, height, width = _resized_crop(rng, image.height, image.width)
        side = self._settings.image_size
        box = (left, top, left + width, top + height)
        image = image.resize((side, side), Image.Resampling[self._preprocessing.interpolation.upper()], box=box)
        if self._settings.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image, dtype=np.uint8)


def _resized_crop(rng: np.random.Generator, height: int, width: int) -> tuple[float, float, float, float]:
    """A random crop (top, left, height, width) of 8 % to 100 % of the area with an aspect ratio from 3/4 to 4/3."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if w <= width and h <= height:
            return rng.uniform(0, height - h), rng.uniform(0, width - w), h, w
    side = min(height, width)
    return (height - side) / 2, (width - side) / 2, side, side


def full_batches(count: int, batch_size: int) -> int:
    """The number of full batches in ``count`` images; an epoch omits the rest. Raises ``DataError`` if it is 0."""
    if count < batch_size:
        raise DataError(
            f"The training set has {count} images, fewer than one batch of {batch_size}.",
            remedy=f"Set train.batch_size to {count} or less, or add images.",
        )
    return count // batch_size


def decode_all(images: ImageSet, preprocessing: Preprocessing) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """All images, decoded and resized, as uint8 (N,S,S,3)."""
    if images.pixels is not None and images.pixels.shape[1] == preprocessing.image_size == preprocessing.resize:
        return images.pixels
    with ThreadPoolExecutor() as pool:
        chunks = [range(start, min(start + 256, len(images))) for start in range(0, len(images), 256)]
        return np.concatenate(list(pool.map(lambda chunk: images.read(list(chunk), preprocessing), chunks)))


def is_resident(images: ImageSet, settings: DataSettings) -> bool:
    """Whether the images, and all of them together, are small enough to be kept on the device."""
    size = len(images) * 3 * settings.image_size**2
    return settings.image_size <= 64 and size <= _RESIDENT_BYTES


def training_batches(
    images: ImageSet,
    settings: DataSettings,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> Batches:
    """The training batches of ``images``, resident on the device if they fit there, otherwise streamed."""
    loader = ResidentBatches if is_resident(images, settings) else StreamedBatches
    return loader(images, settings, batch_size=batch_size, seed=seed, device=device, rank=rank, world=world)


class EvaluationBatches:
    """The batches of a split in its own order, without augmentation; small sets are decoded once."""

    def __init__(
        self,
        images: ImageSet,
        settings: DataSettings,
        *,
        device: torch.device,
        batch_size: int = 250,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self._images, self._device, self._batch_size = images, device, batch_size
        self._preprocessing = preprocessing or preprocessing_of(settings)
        self._normalise = Normaliser(self._preprocessing, device)
        small = is_resident(images, settings)
        self._pixels = decode_all(images, self._preprocessing) if small else None

    def __iter__(self) -> Iterator[Labelled]:
        for start in range(0, len(self._images), self._batch_size):
            indices = range(start, min(start + self._batch_size, len(self._images)))
            if self._pixels is None:
                pixels = self._images.read(list(indices), self._preprocessing)
            else:
                pixels = self._pixels[indices.start : indices.stop]
            chosen = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device)
            labels = torch.from_numpy(self._images.labels[indices.start : indices.stop]).to(self._device)
            yield self._normalise(chosen), labels
