from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification, SemanticSegmentation

from kdexport.data.preprocessing import BACKGROUND
from kdexport.errors import ConfigError
from kdexport.origins.library_preprocessing import from_timm, from_torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: As timm's ``resolve_data_config`` returns it.
TIMM: dict[str, Any] = {
    "input_size": (3, 48, 48),
    "interpolation": "bicubic",
    "mean": MEAN,
    "std": STD,
    "crop_pct": 0.9,
    "crop_mode": "center",
}
SIZES = [(61, 90), (90, 61), (300, 37), (48, 48), (53, 53), (7, 5), (200, 199), (20, 21)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("crop", "resize", "mode"),
    [
        (224, 256, InterpolationMode.BILINEAR),
        (64, 70, InterpolationMode.BICUBIC),
        (48, 48, InterpolationMode.LANCZOS),
        (31, 33, InterpolationMode.NEAREST),
        (32, 37, InterpolationMode.NEAREST_EXACT),
        (40, 36, InterpolationMode.BICUBIC),
    ],
)
def test_a_preset_of_torchvision_gives_the_same_tensor(crop: int, resize: int, mode: InterpolationMode) -> None:
    preset = ImageClassification(crop_size=crop, resize_size=resize, mean=MEAN, std=STD, interpolation=mode)
    preprocessing = from_torchvision(preset)
    assert (preprocessing.image_size, preprocessing.resize) == (crop, resize)
    assert (preprocessing.orientation, preprocessing.background) == ("apply", BACKGROUND)
    for size in SIZES:
        image = noise(*size)
        ours = preprocessing.normalise(preprocessing.pixels(image)[None])[0]
        np.testing.assert_allclose(ours, preset(image).numpy(), rtol=0, atol=1e-6)


def test_the_presets_of_the_shipped_weights_are_read() -> None:
    from torchvision.models import EfficientNet_V2_S_Weights, ResNet50_Weights, ViT_B_16_Weights

    read = [
        from_torchvision(weights.transforms())
        for weights in (
            ResNet50_Weights.IMAGENET1K_V2,
            EfficientNet_V2_S_Weights.IMAGENET1K_V1,
            ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1,
        )
    ]
    assert [(one.image_size, one.resize, one.interpolation) for one in read] == [
        (224, 232, "bilinear"),
        (384, 384, "bilinear"),
        (384, 384, "bicubic"),
    ]


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        (SemanticSegmentation(resize_size=520), "SemanticSegmentation is not a preset of torchvision for image"),
        (torch.nn.Identity(), "Identity is not a preset"),
        (
            SimpleNamespace(crop_size=[224, 200], resize_size=[256], mean=MEAN, std=STD, interpolation="bilinear"),
            r"crop_size is \(224, 200\): inputs of students are square",
        ),
        (
            SimpleNamespace(crop_size=[28], resize_size=[28], mean=[0.5], std=[0.5], interpolation="bilinear"),
            r"mean is \(0.5,\): students take 3 channels \(RGB\)",
        ),
    ],
    ids=["segmentation", "network", "not square", "grey"],
)
def test_presets_that_no_student_can_have_are_refused_with_the_reason(preset: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_torchvision(preset)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0, 1.1])
def test_a_configuration_of_timm_gives_the_same_tensor(crop_mode: str, interpolation: str, crop_pct: float) -> None:
    timm_data = pytest.importorskip("timm.data", reason="timm is not installed")
    config = TIMM | {"crop_mode": crop_mode, "interpolation": interpolation, "crop_pct": crop_pct}
    steps = timm_data.create_transform(**config, is_training=False)
    preprocessing = from_timm(config)
    for size in SIZES:
        image = noise(*size)
        ours = preprocessing.normalise(preprocessing.pixels(image)[None])[0]
        np.testing.assert_allclose(ours, steps(image).numpy(), rtol=0, atol=1e-6)


def test_the_configuration_of_a_network_of_timm_is_read() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("mobilenetv3_small_050", pretrained=False)
    for config in (timm.data.resolve_data_config({}, model=model), model.pretrained_cfg):
        preprocessing = from_timm(config)
        assert (preprocessing.image_size, preprocessing.resize, preprocessing.interpolation) == (224, 256, "bicubic")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_size": (1, 28, 28)}, r"input_size is \(1, 28, 28\): students take 3 channels \(RGB\)"),
        ({"input_size": (3, 224, 160)}, r"input_size is \(224, 160\): inputs of students are square"),
        ({"interpolation": "random"}, "interpolation is 'random': known are nearest, box, bilinear"),
        ({"crop_mode": "corner"}, "crop_mode is 'corner': known are center, squash, border"),
        ({"crop_pct": -0.5}, "crop_pct is -0.5"),
        ({"mean": (0.5,)}, r"mean is \(0.5,\): students take 3 channels"),
        ({"std": (0.2, 0.0, 0.2)}, "each number must be above 0"),
        ({"crop_pct": None}, "The configuration of timm has no crop_pct"),
        ({"input_size": None, "mean": None}, "has no input_size, mean"),
    ],
    ids=str,
)
def test_configurations_that_no_student_can_have_are_refused_with_the_reason(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        from_timm(TIMM | change)


def test_a_configuration_without_a_crop_mode_crops_the_centre() -> None:
    config = {key: value for key, value in TIMM.items() if key != "crop_mode"}
    assert from_timm(config) == from_timm(TIMM)
