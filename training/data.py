"""Batches for training and evaluation: augmented, normalised, on the device; seed and epoch determine them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdexport.data.datasets import ImageSet
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import DataError
from training.augmentation import apply_policy, erased_box
from training.recipe import DataSettings

if TYPE_CHECKING:
    from PIL import Image

#: Decoded data sets up to this size are kept on the device; larger ones are streamed from their files.
_RESIDENT_BYTES = 4 * 2**30
#: Images that are evaluated together.
_EVALUATED = 250
#: Pixels of a channel that a GPU evaluates together, of small images: a thousand of CIFAR's.
_EVALUATED_PIXELS = 1000 * 32**2
#: Batches that are being decoded while one is used.
_BATCHES_AHEAD = 2

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


class EpochDraws(NamedTuple):
    """What is drawn for an epoch of n places: the image (n,) of each, the offset of its crop (n,2), its flip (n,)."""

    order: Tensor
    offsets: Tensor
    flips: Tensor


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
        balanced: bool = False,
    ) -> None:
        self.steps = full_batches(len(images), batch_size)
        self._settings, self._device = settings, device
        self._preprocessing = preprocessing_of(settings)
        self._normalise = Normaliser(self._preprocessing, device)
        self._batch_size, self._seed, self._rank, self._world = batch_size, seed, rank, world
        counts = np.bincount(images.labels)
        #: The frequency of each image, if classes are drawn equally often.
        self._frequencies = torch.from_numpy(1.0 / counts[images.labels]) if balanced else None
        self._load(images)

    def _load(self, images: ImageSet) -> None:
        raise NotImplementedError

    def _own_places(self, step: int) -> slice:
        """The positions, in the order of an epoch, of the images that this process gets in ``step``."""
        return slice(step * self._batch_size + self._rank, (step + 1) * self._batch_size, self._world)

    def _order(self, count: int, generator: torch.Generator) -> Tensor:
        """The images (count,) of an epoch: each once, or drawn with replacement so that classes are balanced."""
        if self._frequencies is None:
            return torch.randperm(count, generator=generator)
        return torch.multinomial(self._frequencies, count, replacement=True, generator=generator)

    def _rng(self, place: "_Place", *purpose: int) -> np.random.Generator:
        """The generator of one image, because the order in which threads and processes run is not repeatable."""
        # An image that is drawn twice in an epoch is changed in two ways.
        twice = () if self._frequencies is None else (place.position,)
        return np.random.default_rng((self._seed, place.epoch, place.sample, *twice, *purpose))

    def _erase(self, images: Tensor, places: Sequence["_Place"]) -> Tensor:
        """Set a random rectangle of some normalised images (B,3,S,S) to the mean colour, in place."""
        for image, place in zip(images, places, strict=True):
            rng = self._rng(place, 1)
            box = erased_box(rng, images.shape[-1]) if rng.random() < self._settings.erasing else None
            if box is not None:
                image[:, box[0], box[1]] = 0
        return images


class _Place(NamedTuple):
    """An image of the training set, where it is in the order of an epoch, and which epoch."""

    sample: int
    position: int
    epoch: int


def _with_margin(preprocessing: Preprocessing, padding: int) -> tuple[Preprocessing, int]:
    """What is decoded for crops that are shifted by up to ``padding`` pixels, and how many pixels have to be padded.

    If the image is resized to more than the crop, the margin has pixels of the image.
    """
    real = min(max(preprocessing.resize - preprocessing.image_size, 0) // 2, padding)
    return replace(preprocessing, image_size=preprocessing.image_size + 2 * real), padding - real


class ResidentBatches(_AugmentedBatches):
    """A set of small images as one uint8 tensor on the device, where each batch is cropped and flipped at random."""

    def _load(self, images: ImageSet) -> None:
        wide, padding = _with_margin(self._preprocessing, self._settings.crop_padding)
        pixels = torch.from_numpy(decode_all(images, wide)).permute(0, 3, 1, 2)
        self._pixels = torch.nn.functional.pad(pixels, (padding,) * 4).to(self._device).contiguous()
        self._labels = torch.from_numpy(images.labels).to(self._device)

    def epoch(self, index: int) -> Iterator[Batch]:
        """The batches of epoch ``index``, in random order, with random crop offsets and flips."""
        drawn = self.draws(index)
        order, offsets, flips = (values.to(self._pixels.device) for values in drawn)
        for step in range(self.steps):
            own = self._own_places(step)
            batch = self.batch(order[own], offsets[own], flips[own])
            if self.erases:
                positions = range(len(order))[own]
                self._erase(batch.images, [_Place(int(drawn.order[p]), p, index) for p in positions])
            yield batch

    @property
    def erases(self) -> bool:
        """Whether images are changed after they were cropped, one by one."""
        return self._settings.erasing > 0

    def draws(self, index: int) -> EpochDraws:
        """What epoch ``index`` draws, on the host."""
        count = len(self._labels)
        generator = epoch_generator(self._seed, index)
        order = self._order(count, generator)
        offsets = torch.randint(2 * self._settings.crop_padding + 1, (count, 2), generator=generator)
        flips = torch.rand(count, generator=generator) < (0.5 if self._settings.flip else 0.0)
        return EpochDraws(order, offsets, flips)

    def batch(self, chosen: Tensor, offsets: Tensor, flips: Tensor) -> Batch:
        """The images ``chosen`` (B,) with their ``offsets`` (B,2) and ``flips`` (B,), nothing erased; on the device."""
        images = self._normalise(self._crop(chosen, offsets, flips))
        return Batch(images, self._labels[chosen], chosen)

    def _crop(self, chosen: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        span = torch.arange(self._settings.image_size, device=chosen.device)
        rows = offsets[:, :1] + span
        columns = offsets[:, 1:] + torch.where(flips[:, None], span.flip(0), span)
        channels = torch.arange(3, device=chosen.device)
        return self._pixels[
            chosen[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None], columns[:, None, None]
        ]


class StreamedBatches(_AugmentedBatches):
    """Images that are too many or too large for the device, or are changed one by one: threads decode and change them.

    The decoder and the resizing of Pillow run without the lock of the interpreter.
    """

    def _load(self, images: ImageSet) -> None:
        self._images, self._labels = images, torch.from_numpy(images.labels)
        # Small images that are streamed for their augmentation are cropped as those on the device.
        chosen = self._settings.crop
        is_small = chosen == "auto" and is_small_set(images, self._settings)
        self._pads = chosen == "padded" or is_small
        self._wide, self._padding = _with_margin(self._preprocessing, self._settings.crop_padding)

    def epoch(self, index: int) -> Iterator[Batch]:
        """The batches of epoch ``index``, in random order; later batches are decoded while the current one is used."""
        order = self._order(len(self._labels), epoch_generator(self._seed, index)).numpy()
        positions = [range(len(order))[self._own_places(step)] for step in range(self.steps)]
        batches = ([_Place(int(order[p]), p, index) for p in own] for own in positions)
        with ThreadPoolExecutor(max(self._settings.workers, 1)) as pool:
            for places, arrays in read_ahead(pool, batches, self._augmented):
                samples = torch.tensor([place.sample for place in places])
                images = self._normalise(on_device(arrays, self._device))
                if self._settings.erasing > 0:
                    images = self._erase(images, places)
                yield Batch(images, self._labels[samples].to(self._device), samples.to(self._device))

    def _augmented(self, place: _Place) -> NDArray[np.uint8]:
        from PIL import Image

        rng = self._rng(place)
        opened = self._images.image(place.sample)
        image = self._shifted(opened, rng) if self._pads else self._resized(opened, rng)
        if self._settings.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(apply_policy(image, self._settings, rng), dtype=np.uint8)

    def _resized(self, opened: "Image.Image", rng: np.random.Generator) -> "Image.Image":
        from PIL import Image

        image = self._preprocessing.rgb(opened)
        top, left, height, width = _resized_crop(rng, image.height, image.width, self._settings.crop_scale)
        side = self._settings.image_size
        box = (left, top, left + width, top + height)
        return image.resize((side, side), Image.Resampling[self._preprocessing.interpolation.upper()], box=box)

    def _shifted(self, opened: "Image.Image", rng: np.random.Generator) -> "Image.Image":
        from PIL import Image

        pixels, padding, side = self._wide.pixels(opened), self._padding, self._settings.image_size
        padded = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)))
        top, left = rng.integers(2 * self._settings.crop_padding + 1, size=2)
        return Image.fromarray(np.ascontiguousarray(padded[top : top + side, left : left + side]))


_Chunk = TypeVar("_Chunk", bound=Sequence[Any])
_Made = TypeVar("_Made")


def read_ahead(
    pool: ThreadPoolExecutor, batches: Iterable[_Chunk], make: Callable[[Any], _Made]
) -> Iterator[tuple[_Chunk, list[_Made]]]:
    """Each batch of items with what ``make`` makes of them in ``pool``, which works on the batches that come next."""
    waiting: deque[tuple[_Chunk, list[Future[_Made]]]] = deque()
    for batch in batches:
        waiting.append((batch, [pool.submit(make, item) for item in batch]))
        if len(waiting) > _BATCHES_AHEAD:
            done, futures = waiting.popleft()
            yield done, [future.result() for future in futures]
    for done, futures in waiting:
        yield done, [future.result() for future in futures]


def on_device(images: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
    """Images (S,S,3) as one tensor (N,3,S,S) on ``device``; the host does not wait for the copy to a GPU."""
    pixels = torch.from_numpy(np.stack(images))
    if device.type == "cuda":
        pixels = pixels.pin_memory()
    return pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)


def _resized_crop(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> tuple[float, float, float, float]:
    """A random crop (top, left, height, width) of a part of the area in ``scale``, with an aspect from 3/4 to 4/3."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if w <= width and h <= height:
            return rng.uniform(0, height - h), rng.uniform(0, width - w), h, w
    side = min(height, width)
    return (height - side) / 2, (width - side) / 2, side, side


def split_validation(images: ImageSet, share: float) -> tuple[ImageSet, ImageSet | None]:
    """The images to train on, and ``share`` of each class, at least one image, to validate on; None for 0.

    The draw depends on the images only, so that runs with different seeds are compared on the same ones. Raises
    ``DataError`` for a class of one image.
    """
    if share == 0:
        return images, None
    rng = np.random.default_rng(0)
    left_out = np.zeros(len(images), dtype=bool)
    for label, name in enumerate(images.classes):
        own = np.flatnonzero(images.labels == label)
        if len(own) < 2:
            raise DataError(
                f"The class {name} has {len(own)} training images: none can be left out for train.validation.",
                remedy="Add images to the class, or set train.validation=0.",
            )
        left_out[rng.permutation(own)[: min(max(1, round(share * len(own))), len(own) - 1)]] = True
    return _selected(images, np.flatnonzero(~left_out)), _selected(images, np.flatnonzero(left_out))


def _selected(images: ImageSet, indices: NDArray[np.int64]) -> ImageSet:
    return replace(
        images,
        labels=images.labels[indices],
        pixels=None if images.pixels is None else images.pixels[indices],
        files=tuple(images.files[index] for index in indices) if images.files else (),
    )


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


def is_small_set(images: ImageSet, settings: DataSettings) -> bool:
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
    balanced: bool = False,
) -> Batches:
    """The training batches of ``images``, resident on the device if they fit there, otherwise streamed.

    Images that are changed one by one are streamed too. ``balanced`` draws all classes equally often.
    """
    whole_batches = settings.policy == "none" and settings.crop != "resized"
    loader = ResidentBatches if whole_batches and is_small_set(images, settings) else StreamedBatches
    return loader(
        images,
        settings,
        batch_size=batch_size,
        seed=seed,
        device=device,
        rank=rank,
        world=world,
        balanced=balanced,
    )


class EvaluationBatches:
    """The batches of a split in its own order, without augmentation; small sets are decoded once.

    Process ``rank`` of ``world`` gets every ``world``-th batch. Larger images are decoded by threads, ahead of their
    use. On one GPU small sets stay there, in larger batches.
    """

    def __init__(
        self,
        images: ImageSet,
        settings: DataSettings,
        *,
        device: torch.device,
        batch_size: int = 0,
        preprocessing: Preprocessing | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._images, self._device, self._workers = images, device, max(settings.workers, 1)
        self._preprocessing = preprocessing or preprocessing_of(settings)
        self._normalise = Normaliser(self._preprocessing, device)
        small = is_small_set(images, settings)
        stays = small and device.type == "cuda" and world == 1
        size = batch_size or (max(_EVALUATED, _EVALUATED_PIXELS // settings.image_size**2) if stays else _EVALUATED)
        starts = range(rank * size, len(images), world * size)
        self._batches = [range(start, min(start + size, len(images))) for start in starts]
        self._pixels = torch.from_numpy(decode_all(images, self._preprocessing)) if small else None
        if self._pixels is not None and stays:
            self._pixels = self._pixels.to(device)

    def __iter__(self) -> Iterator[Labelled]:
        for indices, pixels in self._decoded():
            labels = torch.from_numpy(self._images.labels[indices.start : indices.stop]).to(self._device)
            yield self._normalise(pixels), labels

    def _decoded(self) -> Iterator[tuple[range, Tensor]]:
        if self._pixels is not None:
            for indices in self._batches:
                yield indices, self._pixels[indices.start : indices.stop].permute(0, 3, 1, 2).to(self._device)
            return
        with ThreadPoolExecutor(self._workers) as pool:
            for indices, arrays in read_ahead(pool, self._batches, self._read):
                yield indices, on_device(arrays, self._device)

    def _read(self, index: int) -> NDArray[np.uint8]:
        return self._preprocessing.pixels(self._images.image(index))
