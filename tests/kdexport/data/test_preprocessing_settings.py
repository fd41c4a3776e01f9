from typing import Any

import pytest

from kdexport.core.toml import parse
from kdexport.data.preprocessing import Preprocessing
from kdexport.data.preprocessing_settings import PreprocessingSettings, apply_settings
from kdexport.errors import ConfigError

OLD = Preprocessing(image_size=32, resize=36, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def settings(**table: Any) -> PreprocessingSettings:
    return parse(PreprocessingSettings, table, "build.toml")


def test_an_empty_table_changes_nothing() -> None:
    assert apply_settings(settings(), OLD) == OLD


def test_each_key_replaces_its_field() -> None:
    table = {
        "image_size": 48,
        "resize": 40,
        "geometry": "two_steps",
        "interpolation": "bicubic",
        "fit": "pad",
        "pad_colour": [1, 2, 3],
        "orientation": "apply",
        "background": [9, 8, 7],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.5, 1.0],
    }
    assert apply_settings(settings(**table), OLD) == Preprocessing.from_json(table)


def test_a_background_can_be_ignored_again() -> None:
    shown = apply_settings(settings(background=[0, 0, 0]), OLD)
    assert shown.background == (0, 0, 0)
    assert apply_settings(settings(background="ignore"), shown) == OLD


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"interpolatoin": "bicubic"}, "interpolation"),
        ({"image_size": 4}, "image_size"),
        ({"image_size": [32, 48]}, "image_size"),
        ({"background": [0, 0, 300]}, "background"),
        ({"background": "white"}, "background"),
        ({"std": [0.1, 0.0, 0.1]}, "std"),
        ({"mean": [0.1]}, "mean"),
    ],
    ids=str,
)
def test_wrong_keys_and_values_are_errors_that_name_them(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**table)


def test_keys_that_do_not_fit_the_student_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"\[preprocessing\] does not fit the student: geometry one_step is for fit"):
        apply_settings(settings(fit="squash"), OLD)
