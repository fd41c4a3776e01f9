"""int8 is calibrated on training images only."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from kdexport.build import stages
from kdexport.bundle.manifest import RANGES
from kdexport.data.calibration_images import Calibration, CalibrationSettings
from kdexport.data.datasets import DatasetSpec
from kdexport.data.preprocessing import Preprocessing
from kdexport.graph import calibration_choice
from kdexport.graph.tensor_ranges import read_ranges
from kdexport.workspace import Workspace
from tests.kdexport.build.given_steps import given_model
from tests.kdexport.exported_students import small_graph, small_weights

SIZE = 16
PREPROCESSING = Preprocessing(image_size=SIZE, resize=SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture
def dataset(tmp_path: Path) -> DatasetSpec:
    """Training images of values 51 to 102 of 255, brighter for each class; validation images are black or white."""
    for label in range(5):
        for split, values in (("train", range(51 + 10 * label, 62 + 10 * label)), ("test", (0, 255))):
            folder = tmp_path / "data" / split / f"c{label}"
            folder.mkdir(parents=True)
            for value in values:
                Image.fromarray(np.full((SIZE, SIZE, 3), value, np.uint8)).save(folder / f"{value:03d}.png")
    return DatasetSpec(name=f"folder:{tmp_path / 'data'}")


def calibration(dataset: DatasetSpec, digest: str = "0", **settings: object) -> Calibration:
    found = CalibrationSettings.model_validate({"method": "minmax", **settings})
    return Calibration(settings=found, dataset=dataset, dataset_sha256=digest, preprocessing=PREPROCESSING)


def test_no_validation_image_is_ever_opened(dataset: DatasetSpec, tmp_path: Path) -> None:
    model = given_model(small_graph(tmp_path / "a.onnx", small_weights()))
    path = stages.calibrate(model, calibration(dataset), "int8-u8").result(Workspace(tmp_path / "ws"))
    found = read_ranges(path)["input"]
    assert (found.low, found.high) == pytest.approx((51 / 255, 101 / 255))
    # The images are still read after the validation split was deleted.
    for image in (tmp_path / "data" / "test").rglob("*.png"):
        image.unlink()
    assert sum(len(batch) for batch in calibration(dataset).batches()) == 55


def test_the_images_are_spread_over_all_classes(dataset: DatasetSpec) -> None:
    batches = list(calibration(dataset, images=5).batches())
    assert sorted({round(float(image.mean()) * 255) for image in np.concatenate(batches)}) == [51, 64, 76, 88, 101]
    sizes = [len(batch) for batch in calibration(dataset, images=40).batches()]
    assert sizes == [16, 16, 8]
    assert all(batch.dtype == np.float32 for batch in batches)


def test_a_search_uses_training_images_that_calibration_did_not_use(dataset: DatasetSpec) -> None:
    def levels(images: Iterable[NDArray[np.float32]]) -> Counter[int]:
        return Counter(round(float(image.mean()) * 255) for image in images)

    found = calibration(dataset, images=20)
    images, labels = found.search_images(1000)
    everything = np.concatenate(list(calibration(dataset, images=1000).batches()))
    assert len(images) == len(labels) == 55 - 20
    assert levels(images) + levels(np.concatenate(list(found.batches()))) == levels(everything)
    for image, label in zip(images, labels, strict=True):
        assert 0 <= round(float(image.mean()) * 255) - 51 - 10 * int(label) <= 10
    few, their = found.search_images(5)
    assert sorted(their.tolist()) == [0, 1, 2, 3, 4]
    assert few.shape == (5, 3, SIZE, SIZE)


def test_a_search_uses_the_images_again_if_calibration_used_all_of_them(dataset: DatasetSpec) -> None:
    images, labels = calibration(dataset, images=1000).search_images(1000)
    assert len(images) == len(labels) == 55


def test_an_int8_file_has_its_ranges_beside_it_and_other_forms_have_none(dataset: DatasetSpec, tmp_path: Path) -> None:
    model = given_model(small_graph(tmp_path / "a.onnx", small_weights()))
    workspace = Workspace(tmp_path / "ws")
    settings = calibration(dataset)
    for form in ("int8-u8", "int8-s8"):
        cast = stages.cast(model, form, settings).result(workspace)
        assert cast.form == form
        assert read_ranges(cast.path.with_name(RANGES))["input"].low == pytest.approx(51 / 255)
    bfloat16 = stages.cast(model, "bf16", settings).result(workspace)
    assert [path.name for path in bfloat16.path.parent.iterdir()] == ["model.onnx"]
    assert stages.cast(model, "fp32", settings) is model
    # Measured once for both forms.
    assert len([path for path in (tmp_path / "ws" / "calibrate").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize(
    "changes", [{"method": "entropy"}, {"images": 9}, {"percentile": 99.0}, {"digest": "1"}, {"weight_bits": 8}]
)
def test_everything_that_int8_depends_on_is_in_its_key_and_in_no_other_key(
    dataset: DatasetSpec, changes: dict[str, object]
) -> None:
    before, after = calibration(dataset), calibration(dataset, **changes)  # type: ignore[arg-type]
    model = given_model(Path("a.onnx"))
    same = {
        form: stages.cast(model, form, before).key == stages.cast(model, form, after).key
        for form in ("fp32", "fp16", "bf16", "int8-u8", "int8-s8")
    }
    assert same == {"fp32": True, "fp16": True, "bf16": True, "int8-u8": False, "int8-s8": "weight_bits" in changes}


def test_a_method_that_is_chosen_depends_on_the_form_and_its_bits_and_others_do_not(dataset: DatasetSpec) -> None:
    model = given_model(Path("a.onnx"))

    def keys(method: str) -> tuple[str, ...]:
        return tuple(
            stages.calibrate(model, calibration(dataset, method=method, weight_bits=bits), form).key
            for form, bits in (("int8-u8", 7), ("int8-u8", 8), ("int8-s8", 7), ("int8-s8", 8))
        )

    assert len(set(keys("minmax"))) == len(set(keys("percentile"))) == 1
    seven, eight, *symmetric = keys("auto")
    assert len({seven, eight, *symmetric}) == 3
    # The setting is for CPUs.
    assert symmetric[0] == symmetric[1]


def test_the_chosen_method_is_beside_the_ranges_and_is_told(dataset: DatasetSpec, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    model = given_model(small_graph(tmp_path / "a.onnx", small_weights(), size=SIZE))
    made = stages.cast(model, "int8-s8", calibration(dataset, method="auto")).result(workspace)
    found = json.loads(made.path.with_name("calibration.json").read_text())
    assert read_ranges(made.path.with_name(RANGES))
    told = stages.chosen_ranges(made)
    values = [
        float(value) for value in re.findall(r"(?:minmax|entropy|percentile [\d.]+) ([\d.e-]+)", told.partition(";")[2])
    ]
    assert values == sorted(values)
    assert len(values) == len(found["divergence"])
    best = calibration_choice.name_of(found["method"], found["percentile"])
    assert told.startswith(f"int8-s8: calibrated by {best}; mean divergence from float32 in nats: {best} ")
    found["divergence"]["minmax"] = None
    made.path.with_name("calibration.json").write_text(json.dumps(found))
    assert stages.chosen_ranges(made).endswith(", minmax not finite")
    plain = stages.cast(model, "int8-s8", calibration(dataset)).result(workspace)
    assert not plain.path.with_name("calibration.json").exists()
    assert stages.chosen_ranges(plain) == ""


def test_the_manifest_records_the_split_and_the_method_of_calibration() -> None:
    said = calibration(DatasetSpec(name="digits"), digest="d", method="percentile", images=64).to_json()
    assert said == {
        "method": "percentile", "images": 64, "percentile": 99.99, "weight_bits": 7, "split": "train",
        "dataset_sha256": "d",
    }  # fmt: skip
