from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from kdexport.data.datasets import DatasetSpec, ImageSet, open_dataset
from kdexport.data.preprocessing import Preprocessing, differing_fields
from kdexport.errors import DataError
from training.data import (
    Batches,
    EvaluationBatches,
    ResidentBatches,
    StreamedBatches,
    preprocessing_of,
    read_ahead,
    split_validation,
    training_batches,
)
from training.recipe import DataSettings

Pixels = NDArray[np.uint8]
CPU = torch.device("cpu")
COUNT, SIDE, PADDING = 29, 12, 3
#: A crop of the padded images, and where it comes from: image, top, left, mirrored.
Origin = tuple[int, int, int, bool]


def settings(**changes: object) -> DataSettings:
    defaults: dict[str, object] = {
        "name": "digits",
        "image_size": SIDE,
        "mean": (0.4, 0.51, 0.33),
        "std": (0.21, 0.3, 0.27),
        "crop_padding": PADDING,
        "workers": 2,
    }
    return DataSettings.model_validate({**defaults, **changes})


def noise_images(count: int = COUNT, side: int = SIDE) -> ImageSet:
    rng = np.random.default_rng(0)
    return ImageSet(
        classes=tuple("abcde"),
        labels=rng.integers(0, 5, count),
        pixels=rng.integers(1, 256, (count, side, side, 3), dtype=np.uint8),
        files=(),
    )


def resident(images: ImageSet, *, seed: int = 5, rank: int = 0, world: int = 1, **changes: object) -> ResidentBatches:
    chosen = settings(**changes)
    return ResidentBatches(images, chosen, batch_size=8, seed=seed, device=CPU, rank=rank, world=world)


def collected(batches: Batches, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = list(batches.epoch(epoch))
    assert len(parts) == batches.steps
    return torch.cat([images for images, _, _ in parts]), torch.cat([labels for _, labels, _ in parts])


def every_crop(images: ImageSet, chosen: DataSettings) -> dict[bytes, Origin]:
    """All crops there are, as the bytes of their normalised pixels."""
    assert images.pixels is not None
    found: dict[bytes, Origin] = {}
    normalise = preprocessing_of(chosen).normalise
    for index, image in enumerate(images.pixels):
        padded = np.zeros((SIDE + 2 * PADDING, SIDE + 2 * PADDING, 3), np.uint8)
        padded[PADDING : PADDING + SIDE, PADDING : PADDING + SIDE] = image
        for top in range(2 * PADDING + 1):
            for left in range(2 * PADDING + 1):
                crop = padded[top : top + SIDE, left : left + SIDE]
                for mirrored in (False, True):
                    pixels = crop[:, ::-1] if mirrored else crop
                    found[normalise(pixels[None]).tobytes()] = (index, top, left, mirrored)
    assert len(found) == len(images) * (2 * PADDING + 1) ** 2 * 2
    return found


def origins(images: ImageSet, batches: Batches, epoch: int, chosen: DataSettings) -> list[Origin]:
    known = every_crop(images, chosen)
    pixels, labels = collected(batches, epoch)
    found = [known[image.contiguous().numpy().tobytes()] for image in pixels]
    np.testing.assert_array_equal(labels.numpy(), images.labels[[index for index, *_ in found]])
    return found


def write_gradients(root: Path, sizes: list[tuple[int, int]]) -> ImageSet:
    """Images whose red rises to the right, whose green rises downwards and whose blue is their number; two classes."""
    for index, (width, height) in enumerate(sizes):
        pixels = np.zeros((height, width, 3))
        pixels[..., 0] = np.linspace(0, 250, width)
        pixels[..., 1] = np.linspace(0, 250, height)[:, None]
        pixels[..., 2] = 5 * index
        folder = root / "train" / ("even", "odd")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(pixels).astype(np.uint8)).save(folder / f"{index:03}.png")
    return open_dataset(DatasetSpec(name=f"folder:{root}"), "train")


def decoded(batch: torch.Tensor, chosen: DataSettings) -> NDArray[np.float64]:
    """(N,H,W,3) in 0..255."""
    channels_last = batch.permute(0, 2, 3, 1).double().numpy()
    return np.asarray((channels_last * np.array(chosen.std) + np.array(chosen.mean)) * 255)


def test_small_images_live_on_the_device_and_large_ones_are_streamed() -> None:
    images = noise_images()
    for side, kind in ((64, ResidentBatches), (65, StreamedBatches), (224, StreamedBatches)):
        chosen = settings(image_size=side)
        assert type(training_batches(images, chosen, batch_size=8, seed=0, device=CPU)) is kind


def test_every_batch_is_a_random_crop_of_the_zero_padded_images_mirrored_or_not() -> None:
    images = noise_images()
    found = origins(images, resident(images), 0, settings()) + origins(images, resident(images), 1, settings())
    assert {top for _, top, _, _ in found} == set(range(2 * PADDING + 1))
    assert {left for _, _, left, _ in found} == set(range(2 * PADDING + 1))
    assert len({(top, left) for _, top, left, _ in found}) > 2 * PADDING + 1
    assert 10 < sum(mirrored for *_, mirrored in found) < 38


def test_every_image_comes_at_most_once_an_epoch_and_all_come_in_the_end() -> None:
    images, batches = noise_images(), resident(noise_images())
    seen: set[int] = set()
    assert batches.steps == COUNT // 8
    for epoch in range(6):
        indices = [index for index, *_ in origins(images, batches, epoch, settings())]
        assert len(indices) == len(set(indices)) == batches.steps * 8
        seen.update(indices)
    assert seen == set(range(COUNT))


def test_no_image_is_mirrored_by_default() -> None:
    images = noise_images()
    found = [
        origin for epoch in range(3) for origin in origins(images, resident(images, flip=False), epoch, settings())
    ]
    assert not any(mirrored for *_, mirrored in found)


def test_without_padding_the_images_are_whole() -> None:
    images = noise_images()
    found = origins(images, resident(images, crop_padding=0), 2, settings())
    assert {(top, left) for _, top, left, _ in found} == {(PADDING, PADDING)}
    assert len({mirrored for *_, mirrored in found}) == 2


def test_an_epoch_is_a_function_of_seed_and_number_alone() -> None:
    images = noise_images()
    used = resident(images)
    collected(used, 0)
    torch.manual_seed(1234)
    again, fresh = collected(used, 3), collected(resident(images), 3)
    assert torch.equal(again[0], fresh[0])
    assert torch.equal(again[1], fresh[1])
    others = [collected(used, 4), collected(used, 0), collected(resident(images, seed=6), 3)]
    assert not any(torch.equal(again[0], other[0]) for other in others)
    orders = {tuple(index for index, *_ in origins(images, used, epoch, settings())) for epoch in range(4)}
    assert len(orders) == 4


@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_see_exactly_the_batches_of_one(world: int) -> None:
    images = noise_images()
    whole = list(resident(images).epoch(1))
    shares = [list(resident(images, rank=rank, world=world).epoch(1)) for rank in range(world)]
    assert [len(share) for share in shares] == [len(whole)] * world
    for step, parts in enumerate(whole):
        for rank in range(world):
            for mine, part in zip(shares[rank][step], parts, strict=True):
                assert torch.equal(mine, part[rank::world])


@pytest.mark.parametrize("streamed", [False, True])
def test_every_image_comes_with_its_place_in_the_set(streamed: bool, tmp_path: Path) -> None:
    loader = StreamedBatches if streamed else ResidentBatches
    images = write_gradients(tmp_path, [(110, 100), (97, 140)] * 6) if streamed else noise_images()
    chosen = settings(image_size=96) if streamed else settings()
    seen: list[int] = []
    for batch in loader(images, chosen, batch_size=4, seed=9, device=CPU).epoch(3):
        assert batch.labels.tolist() == [int(images.labels[place]) for place in batch.samples.tolist()]
        seen += batch.samples.tolist()
    assert len(seen) == len(set(seen)) == len(images) // 4 * 4
    assert seen != sorted(seen)


def test_batches_are_channels_last_and_of_the_evaluation_size() -> None:
    images, labels, samples = next(resident(noise_images()).epoch(0))
    assert images.shape == (8, 3, SIDE, SIDE)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == samples.dtype == torch.int64


def test_images_of_another_size_are_resized_before_they_are_cropped(tmp_path: Path) -> None:
    images = write_gradients(tmp_path, [(40, 20), (20, 50), (31, 31)] * 4)
    chosen = settings(crop_padding=0, flip=False)
    batches = ResidentBatches(images, chosen, batch_size=12, seed=1, device=CPU)
    pixels, _ = collected(batches, 0)
    preprocessing = preprocessing_of(chosen)
    expected = preprocessing.normalise(np.stack([preprocessing.pixels(Image.open(path)) for path in images.files]))
    assert {image.tobytes() for image in expected} == {image.contiguous().numpy().tobytes() for image in pixels}


@pytest.mark.parametrize("image_size", [SIDE, 96])
def test_too_few_images_for_one_batch_are_refused(image_size: int) -> None:
    with pytest.raises(DataError) as caught:
        training_batches(noise_images(7), settings(image_size=image_size), batch_size=8, seed=0, device=CPU)
    assert str(caught.value) == (
        "The training set has 7 images, fewer than one batch of 8.\nSet train.batch_size to 7 or less, or add images."
    )


def test_streamed_batches_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    images = write_gradients(tmp_path, [(120, 100), (97, 140), (300, 128)] * 4)

    def batches(seed: int, **changes: object) -> Batches:
        return training_batches(images, settings(image_size=96, **changes), batch_size=5, seed=seed, device=CPU)

    reference = collected(batches(2, workers=1), 1)
    for workers in (0, 2, 7):
        pixels, labels = collected(batches(2, workers=workers), 1)
        assert torch.equal(pixels, reference[0])
        assert torch.equal(labels, reference[1])
    for epoch, seed in ((0, 2), (1, 3)):
        assert not torch.equal(collected(batches(seed), epoch)[0], reference[0])


def test_streamed_images_keep_their_labels_and_come_at_most_once(tmp_path: Path) -> None:
    images = write_gradients(tmp_path, [(120, 100), (97, 140), (300, 128)] * 4)
    chosen = settings(image_size=96)
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        batches = StreamedBatches(images, chosen, batch_size=4, seed=9, device=CPU, rank=rank, world=world)
        pixels, labels = collected(batches, 0)
        assert pixels.shape == (12 // world, 3, 96, 96)
        numbers = np.rint(decoded(pixels, chosen)[..., 2].mean((1, 2)) / 5).astype(int)
        assert len(set(numbers.tolist())) == 12 // world
        np.testing.assert_array_equal(labels.numpy(), numbers % 2)


def test_streaming_processes_together_see_exactly_the_batches_of_one(tmp_path: Path) -> None:
    images = write_gradients(tmp_path, [(110, 100), (97, 140)] * 4)

    def batches(rank: int, world: int) -> StreamedBatches:
        chosen = settings(image_size=96)
        return StreamedBatches(images, chosen, batch_size=4, seed=9, device=CPU, rank=rank, world=world)

    for (whole, labels, _), (first, some, _), (second, others, _) in zip(
        batches(0, 1).epoch(2), batches(0, 2).epoch(2), batches(1, 2).epoch(2), strict=True
    ):
        assert torch.equal(torch.stack([first, second], 1).flatten(0, 1), whole)
        assert torch.equal(torch.stack([some, others], 1).flatten(), labels)


@pytest.mark.parametrize("flip", [False, True])
def test_streamed_crops_cover_8_to_100_percent_at_moderate_aspect(flip: bool, tmp_path: Path) -> None:
    images = write_gradients(tmp_path, [(200, 150)] * 24)
    chosen = settings(image_size=96, flip=flip)
    batches = StreamedBatches(images, chosen, batch_size=24, seed=4, device=CPU)
    pixels = np.concatenate([decoded(collected(batches, epoch)[0], chosen) for epoch in range(3)])
    # Red and green are the place in the source; a resampled edge pixel lies half a step inside the crop's border.
    across, down = pixels[:, 48, :, 0], pixels[:, :, 48, 1]
    widths = np.abs(across[:, -1] - across[:, 0]) / 250 * 96 / 95
    heights = (down[:, -1] - down[:, 0]) / 250 * 96 / 95
    areas, aspects = widths * heights, widths * 200 / (heights * 150)
    assert areas.min() > 0.07
    assert areas.max() < 1.03
    assert areas.max() - areas.min() > 0.5
    assert aspects.min() > 3 / 4 * 0.94
    assert aspects.max() < 4 / 3 * 1.06
    assert aspects.max() / aspects.min() > 1.4
    mirrored = int((across[:, -1] < across[:, 0]).sum())
    assert 18 < mirrored < 54 if flip else mirrored == 0


def test_an_image_too_narrow_for_any_crop_gives_its_central_square(tmp_path: Path) -> None:
    images = write_gradients(tmp_path, [(400, 20), (16, 500)])
    chosen = settings(image_size=96, flip=False)
    pixels, labels = collected(StreamedBatches(images, chosen, batch_size=2, seed=0, device=CPU), 0)
    wide, tall = decoded(pixels, chosen)[labels.argsort().numpy()]
    assert wide[..., 0].min() == pytest.approx(250 * (190 / 399), abs=2)
    assert wide[..., 0].max() == pytest.approx(250 * (209 / 399), abs=2)
    assert wide[..., 1].min() < 5
    assert wide[..., 1].max() > 245
    assert tall[..., 1].min() == pytest.approx(250 * (242 / 499), abs=2)
    assert tall[..., 1].max() == pytest.approx(250 * (257 / 499), abs=2)


def test_the_keys_of_a_recipe_are_those_of_its_student() -> None:
    default = preprocessing_of(settings(resize=14))
    assert default == Preprocessing.for_new_student(
        image_size=SIDE, resize=14, mean=(0.4, 0.51, 0.33), std=(0.21, 0.3, 0.27)
    )
    chosen = preprocessing_of(
        settings(resize=14, interpolation="bicubic", fit="pad", orientation="ignore", background="ignore")
    )
    assert differing_fields(default, chosen) == ("interpolation", "fit", "orientation", "background")
    assert preprocessing_of(settings(background=(255, 0, 9))).background == (255, 0, 9)


@pytest.mark.parametrize("image_size", [SIDE, 96])
def test_training_sees_photos_upright_and_on_the_background(image_size: int, tmp_path: Path) -> None:
    """A photo and its sideways twin with hidden colours give the same batches, decoded at once or streamed."""
    colours = np.random.default_rng(6).integers(0, 256, (4, 110, 130, 3), dtype=np.uint8)
    alpha = np.zeros((110, 130), np.uint8)
    alpha[20:90, 10:100] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    twins: dict[str, list[Path]] = {"plain": [], "sideways": []}
    for number, image in enumerate(colours):
        plain, sideways = (tmp_path / f"{twin}{number}.png" for twin in twins)
        Image.fromarray(np.where(alpha[..., None] > 0, image, 0).astype(np.uint8)).save(plain)
        hidden = Image.fromarray(np.dstack([image, alpha]))
        hidden.transpose(Image.Transpose.ROTATE_90).save(sideways, exif=exif)
        twins["plain"].append(plain)
        twins["sideways"].append(sideways)
    batches = []
    for files in twins.values():
        images = ImageSet(classes=("a", "b"), labels=np.array([0, 1, 0, 1]), pixels=None, files=tuple(files))
        chosen = settings(image_size=image_size)
        batches.append(collected(training_batches(images, chosen, batch_size=4, seed=2, device=CPU), 0)[0])
    assert torch.equal(*batches)


def test_a_corrupt_streamed_image_stops_the_epoch_with_its_name(tmp_path: Path) -> None:
    images = write_gradients(tmp_path, [(110, 100)] * 6)
    images.files[4].write_bytes(images.files[4].read_bytes()[:90])
    batches = StreamedBatches(images, settings(image_size=96), batch_size=2, seed=0, device=CPU)
    with pytest.raises(DataError, match=images.files[4].name):
        list(batches.epoch(0))


@pytest.mark.parametrize("image_size", [SIDE, 96])
def test_evaluation_reads_the_split_in_its_order_as_in_production(image_size: int, tmp_path: Path) -> None:
    images = write_gradients(tmp_path, [(120, 100), (97, 140), (300, 128), (96, 96), (12, 12), (20, 40), (33, 32)])
    chosen = settings(image_size=image_size, resize=image_size + 4)
    evaluation = EvaluationBatches(images, chosen, device=CPU, batch_size=3)
    for _ in range(2):
        parts = list(evaluation)
        assert [len(labels) for _, labels in parts] == [3, 3, 1]
        preprocessing = preprocessing_of(chosen)
        expected = preprocessing.normalise(np.stack([preprocessing.pixels(Image.open(path)) for path in images.files]))
        np.testing.assert_array_equal(torch.cat([pixels for pixels, _ in parts]).numpy(), expected)
        np.testing.assert_array_equal(torch.cat([labels for _, labels in parts]).numpy(), images.labels)


def test_evaluation_of_decoded_images_reads_them_as_they_are() -> None:
    images = noise_images()
    assert images.pixels is not None
    parts = list(EvaluationBatches(images, settings(), device=CPU))
    np.testing.assert_array_equal(parts[0][0].numpy(), preprocessing_of(settings()).normalise(images.pixels))
    np.testing.assert_array_equal(parts[0][1].numpy(), images.labels)


def test_images_that_come_as_one_array_are_streamed_like_their_files(tmp_path: Path) -> None:
    array = noise_images(6, side=40)
    assert array.pixels is not None
    for index, pixels in enumerate(array.pixels):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    paths = tuple(tmp_path / f"{index}.png" for index in range(6))
    files = ImageSet(classes=array.classes, labels=array.labels, pixels=None, files=paths)
    chosen = settings(image_size=70)
    one, other = (
        collected(StreamedBatches(images, chosen, batch_size=3, seed=2, device=CPU), 1) for images in (array, files)
    )
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert one[0].shape == (6, 3, 70, 70)
    assert one[0].std() > 0.5


def labelled_images(counts: tuple[int, ...], side: int = 16) -> ImageSet:
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    pixels = np.random.default_rng(1).integers(0, 256, (len(labels), side, side, 3), dtype=np.uint8)
    return ImageSet(classes=tuple(f"class{i}" for i in range(len(counts))), labels=labels, pixels=pixels, files=())


def test_balanced_sampling_draws_every_class_equally_often() -> None:
    images = labelled_images((90, 9, 1))
    batches = training_batches(images, settings(image_size=16), batch_size=20, seed=2, device=CPU, balanced=True)
    drawn = np.concatenate([batch.labels.numpy() for index in range(12) for batch in batches.epoch(index)])
    assert len(drawn) == 12 * 100
    # 400 of each, with a standard deviation of 16.
    assert np.all(np.abs(np.bincount(drawn) - 400) < 80)


@pytest.mark.parametrize("policy", ["none", "trivialaugment"])
def test_images_drawn_twice_are_changed_in_two_ways(policy: str) -> None:
    images = labelled_images((6, 1), side=20)
    chosen = settings(image_size=16, policy=policy, crop="resized", erasing=0.9)
    batches = training_batches(images, chosen, batch_size=7, seed=2, device=CPU, balanced=True)
    (batch,) = batches.epoch(0)
    rare = batch.images[batch.samples == 6]
    assert len(rare) > 1
    assert not torch.equal(rare[0], rare[1])


def test_validation_images_are_a_part_of_each_class_whatever_the_seed() -> None:
    images = labelled_images((20, 7, 2))
    kept, left = split_validation(images, 0.25)
    assert left is not None
    assert np.bincount(kept.labels).tolist() == [15, 5, 1]
    assert np.bincount(left.labels).tolist() == [5, 2, 1]
    assert kept.classes == left.classes == images.classes
    assert kept.pixels is not None
    assert left.pixels is not None
    assert images.pixels is not None
    parts = {pixels.tobytes() for pixels in (*kept.pixels, *left.pixels)}
    assert parts == {pixels.tobytes() for pixels in images.pixels}
    again = split_validation(images, 0.25)[1]
    assert again is not None
    assert again.fingerprint() == left.fingerprint()
    assert split_validation(images, 0.0) == (images, None)
    with pytest.raises(DataError, match="The class class1 has 1 training images"):
        split_validation(labelled_images((5, 1)), 0.2)


def test_a_crop_shifts_into_real_pixels_where_the_image_has_them() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 256, (3, 20, 20, 3), dtype=np.uint8)
    images = ImageSet(classes=("a", "b"), labels=np.array([0, 1, 0]), pixels=pixels, files=())
    chosen = settings(image_size=16, resize=20, crop_padding=3, flip=False)
    for kind in (ResidentBatches, StreamedBatches):
        batches = kind(images, chosen.model_copy(update={"crop": "padded"}), batch_size=3, seed=0, device=CPU)
        places = set()
        for index in range(30):
            (batch,) = batches.epoch(index)
            values = denormalised(batch.images, chosen)
            for image, sample in zip(values, batch.samples.tolist(), strict=True):
                padded = np.pad(pixels[sample], ((1, 1), (1, 1), (0, 0)))
                found = [
                    (r, c) for r in range(7) for c in range(7) if np.array_equal(padded[r : r + 16, c : c + 16], image)
                ]
                assert len(found) == 1
                places.add(found[0])
        assert {r for r, _ in places} == set(range(7))
        assert {c for _, c in places} == set(range(7))


def denormalised(images: torch.Tensor, chosen: DataSettings) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (chosen.mean, chosen.std))
    return ((images * std + mean) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


def test_erasing_sets_rectangles_of_some_images_to_the_mean_colour() -> None:
    images = labelled_images((30, 30), side=16)
    plain = settings(image_size=16, crop_padding=0, flip=False)
    for changes in ({}, {"crop": "padded", "policy": "none"}):
        chosen = plain.model_copy(update={"erasing": 0.5, **changes})
        erased, whole = (
            {int(s): image for b in training_batches(images, c, batch_size=20, seed=3, device=CPU).epoch(1)
             for s, image in zip(b.samples, b.images, strict=True)}
            for c in (chosen, plain)
        )  # fmt: skip
        changed = {sample for sample, image in erased.items() if not torch.equal(image, whole[sample])}
        assert 15 < len(changed) < 45
        for sample in changed:
            assert (erased[sample] == 0).all(0).any()
            kept = (erased[sample] != 0).any(0)
            assert torch.equal(erased[sample][:, kept], whole[sample][:, kept])


def test_processes_evaluate_every_image_once() -> None:
    images = labelled_images((30, 21), side=16)
    for size in (16, 96):
        parts = [
            list(EvaluationBatches(images, settings(image_size=size), device=CPU, batch_size=8, rank=rank, world=3))
            for rank in range(3)
        ]
        sizes = sorted(len(labels) for part in parts for _, labels in part)
        assert sizes == [3, 8, 8, 8, 8, 8, 8]
        labels = torch.cat([labels for part in parts for _, labels in part])
        assert labels.bincount().tolist() == [30, 21]


def test_decoding_ahead_stops_at_the_first_damaged_image_with_its_name() -> None:
    def make(item: int) -> int:
        if item == 7:
            raise DataError("image 7 is damaged", remedy="Remove it.")
        return item * item

    with ThreadPoolExecutor(2) as pool:
        ahead = read_ahead(pool, [range(3), range(3, 6), range(6, 9)], make)
        assert next(ahead) == (range(3), [0, 1, 4])
        assert next(ahead) == (range(3, 6), [9, 16, 25])
        with pytest.raises(DataError, match="image 7"):
            next(ahead)
