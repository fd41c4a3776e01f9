"""Quantize-aware training: a run that was interrupted ends with the same bits, and bad input is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from kdexport.checkpoint import StudentSpec, save_program_checkpoint
from kdexport.data.datasets import DatasetSpec, open_dataset
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import DataError
from kdexport.graph.fake_quantized import FakeQuantized
from kdexport.graph.quantize import quantize
from kdexport.graph.tensor_ranges import calibrate, read_ranges
from tests.kdexport.other_networks import CLASSES, SIZE, Averaged, folded_file, pictures
from training.quantize_aware import (
    METRICS,
    TRAINED_RANGES,
    WEIGHTS,
    QuantizeAwareJob,
    data_settings,
    train_quantize_aware,
)
from training.recipe import load_recipe
from training.runs import loop
from training.runs.state import save_state

PREPROCESSING = Preprocessing(image_size=SIZE, resize=SIZE + 4, mean=(0.5, 0.4, 0.3), std=(0.3, 0.25, 0.35))
SETTINGS: dict[str, Any] = {
    "teacher": "student", "epochs": 3, "batch_size": 16, "learning_rate": 0.01, "temperature": 2.0,
    "cross_entropy": 0.25, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> QuantizeAwareJob:
    """A small network of another origin as the int8 graph of its calibration on 40 images in folders."""
    root = tmp_path_factory.mktemp("quantize_aware")
    pixels = pictures(8 * CLASSES, 5)
    for index, image in enumerate(pixels):
        for split in ("train", "val"):
            folder = root / "data" / split / f"class{index % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index}.png")
    graph, _ = folded_file(Averaged(), root / "float32.onnx")
    data = DatasetSpec(name=f"folder:{root / 'data'}")
    classes = open_dataset(data, "train").classes
    spec = StudentSpec(
        student="tests:averaged", classes=classes, preprocessing=PREPROCESSING, branches=None, provenance={}
    )
    save_program_checkpoint(root / "student", graph, spec)
    images = PREPROCESSING.normalise(pixels)
    calibrate(root / "float32.onnx", [images], root / "ranges.json", method="minmax", percentile=99.99)
    quantize(root / "float32.onnx", root / "ranges.json", root / "int8.onnx", form="int8-u8", weight_bits=7)
    described = {
        "float32": str(root / "float32.onnx"), "quantized": str(root / "int8.onnx"),
        "ranges": str(root / "ranges.json"), "weight_bits": 7, "student": str(root / "student"),
        "dataset": {"name": data.name, "root": ""}, "settings": SETTINGS, "recipe": "", "overrides": {},
    }  # fmt: skip
    (root / "job.json").write_text(json.dumps(described))
    return QuantizeAwareJob.read(root / "job.json")


def results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return load_file(folder / WEIGHTS), json.loads((folder / TRAINED_RANGES).read_text())


def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    job: QuantizeAwareJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_quantize_aware(job, tmp_path / "whole")
    kept = save_state

    def interrupted(*given: Any) -> None:
        kept(*given)
        raise KeyboardInterrupt

    for _ in range(2):
        monkeypatch.setattr(loop, "save_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_quantize_aware(job, tmp_path / "parted")
        assert not (tmp_path / "parted" / WEIGHTS).exists()
    monkeypatch.undo()
    last = train_quantize_aware(job, tmp_path / "parted")
    whole, parted = (results(tmp_path / name) for name in ("whole", "parted"))
    assert whole[0].keys() == parted[0].keys() >= {"first.weight", "second.bias"}
    assert all(np.array_equal(whole[0][name], parted[0][name]) for name in whole[0])
    assert whole[1] == parted[1]
    history = json.loads((tmp_path / "parted" / METRICS).read_text())["history"]
    assert len(history) == 3
    assert history[-1]["loss/kd"] == last["loss/kd"]


def test_training_brings_the_int8_graph_nearer_to_its_teacher(job: QuantizeAwareJob, tmp_path: Path) -> None:
    settings = {**SETTINGS, "cross_entropy": 0.0, "learning_rate": 2e-3, "epochs": 6}
    train_quantize_aware(replace(job, settings=settings), tmp_path)
    first, *_, last = (entry["loss/kd"] for entry in json.loads((tmp_path / METRICS).read_text())["history"])
    assert last < 0.8 * first
    # The weights of the file changed, and only those that int8 layers have.
    before = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(str(job.float32)).graph.initializer}
    after, _ = results(tmp_path)
    assert all(after[name].shape == before[name].shape for name in after)
    assert any(not np.array_equal(after[name], before[name]) for name in after)
    graph = FakeQuantized(
        onnx.load(str(job.quantized)), onnx.load(str(job.float32)), read_ranges(job.ranges), weight_bits=7
    )
    assert after.keys() == graph.trained_weights().keys()
    assert torch.isfinite(torch.from_numpy(after["first.weight"])).all()


def test_fewer_images_than_one_batch_are_an_error_in_words(job: QuantizeAwareJob, tmp_path: Path) -> None:
    count = 8 * CLASSES
    crowded = replace(job, settings={**SETTINGS, "batch_size": count + 1})
    with pytest.raises(DataError, match=rf"{count} training images, fewer than one batch of {count + 1}"):
        train_quantize_aware(crowded, tmp_path)


def test_images_are_prepared_as_the_student_reads_them_whatever_its_recipe_says() -> None:
    preprocessing = replace(PREPROCESSING, interpolation="bicubic", background=None)
    recipe = load_recipe("digits", {"data": {"flip": True, "crop_padding": 2, "image_size": 16}})
    for given, flip, padding in ((recipe, True, 2), (None, False, SIZE // 16)):
        made = data_settings(DatasetSpec(name="folder:x"), preprocessing, given)
        assert (made.image_size, made.resize, made.mean, made.std) == (
            SIZE,
            SIZE + 4,
            (0.5, 0.4, 0.3),
            (0.3, 0.25, 0.35),
        )
        assert (made.interpolation, made.background, made.flip, made.crop_padding) == (
            "bicubic",
            "ignore",
            flip,
            padding,
        )
