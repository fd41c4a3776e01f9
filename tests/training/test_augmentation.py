import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from training.augmentation import apply_policy, erased_box, operate
from training.recipe import DataSettings

LARGEST = {"shear": 0.5, "translate": 10.0, "rotate": 90.0, "enhance": 0.8, "posterize": 6}


def noise(seed: int = 0, size: tuple[int, int] = (20, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def settings(**changes: Any) -> DataSettings:
    return DataSettings.model_validate({"name": "digits", "image_size": 16, **changes})


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda x, _: x,
    "autocontrast": lambda x, _: ImageOps.autocontrast(x),
    "equalize": lambda x, _: ImageOps.equalize(x),
    "posterize": lambda x, part: ImageOps.posterize(x, 8 - round(6 * part)),
    "brightness": lambda x, part: ImageEnhance.Brightness(x).enhance(1 - 0.8 * part),
    "contrast": lambda x, part: ImageEnhance.Contrast(x).enhance(1 - 0.8 * part),
    "color": lambda x, part: ImageEnhance.Color(x).enhance(1 - 0.8 * part),
    "sharpness": lambda x, part: ImageEnhance.Sharpness(x).enhance(1 - 0.8 * part),
    "rotate": lambda x, part: x.rotate(-90 * part),
}


@pytest.mark.parametrize("name", PILLOW)
@pytest.mark.parametrize("level", [0, 11, 30])
def test_an_operation_is_that_of_pillow_in_its_strength(name: str, level: int) -> None:
    image = noise()
    found = operate(image, name, level, LARGEST, negative=True)
    assert np.array_equal(np.asarray(found), np.asarray(PILLOW[name](image, level / 30)))


def test_solarising_shears_and_translations_move_what_they_should() -> None:
    image = noise(size=(21, 21))
    pixels = np.asarray(image)
    half = np.asarray(operate(image, "solarize", 15, LARGEST, negative=False))
    assert np.array_equal(half, np.where(pixels < 127.5, pixels, 255 - pixels))
    right = np.asarray(operate(image, "translate_x", 12, LARGEST, negative=False))
    assert np.array_equal(right[:, 4:], pixels[:, :-4])
    up = np.asarray(operate(image, "translate_y", 12, LARGEST, negative=True))
    assert np.array_equal(up[:-4], pixels[4:])
    sheared = np.asarray(operate(image, "shear_x", 30, LARGEST, negative=False))
    # Each row moves by half of its distance from the upper edge.
    for row in (4, 11, 20):
        assert any(
            np.array_equal(sheared[row, : 20 - move], pixels[row, move:20]) for move in (row // 2, (row + 1) // 2)
        )


@pytest.mark.parametrize("policy", ["trivialaugment", "randaugment"])
def test_a_policy_is_a_function_of_its_generator_and_changes_most_images(policy: str) -> None:
    chosen = settings(policy=policy)
    outcomes = [np.asarray(apply_policy(noise(), chosen, np.random.default_rng(s))) for s in range(40)]
    again = [np.asarray(apply_policy(noise(), chosen, np.random.default_rng(s))) for s in range(40)]
    assert all(np.array_equal(a, b) for a, b in zip(outcomes, again, strict=True))
    assert all(outcome.shape == (20, 24, 3) for outcome in outcomes)
    changed = sum(not np.array_equal(outcome, np.asarray(noise())) for outcome in outcomes)
    assert changed > 25
    assert len({outcome.tobytes() for outcome in outcomes}) > 20


def test_without_a_policy_an_image_is_left_alone() -> None:
    image, rng = noise(), np.random.default_rng(4)
    assert apply_policy(image, settings(), rng) is image
    assert rng.random() == np.random.default_rng(4).random()


def test_erased_rectangles_have_the_published_sizes() -> None:
    boxes = [erased_box(np.random.default_rng(seed), 64) for seed in range(300)]
    assert sum(box is None for box in boxes) < 10
    sizes = [(b[0].stop - b[0].start, b[1].stop - b[1].start) for b in boxes if b is not None]
    for box in boxes:
        assert box is None or (0 <= box[0].start < box[0].stop <= 64 and 0 <= box[1].start < box[1].stop <= 64)
    areas = [height * width / 64**2 for height, width in sizes]
    aspects = [height / width for height, width in sizes]
    assert 0.015 < min(areas) < 0.04
    assert 0.28 < max(areas) < 0.35
    assert 0.25 < min(aspects) < 0.4
    assert 2.5 < max(aspects) < 3.7
    assert abs(np.mean(np.log(aspects))) < 0.15 * math.log(3.3)
