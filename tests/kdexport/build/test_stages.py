"""The key of a cached result: it depends on everything that the result depends on, and on nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdexport.backends import nvidia, trt
from kdexport.backends.trt import TensorRT
from kdexport.build import stages
from kdexport.build.precision_search import search, search_requests
from kdexport.build.steps import BuildInputs, declare
from kdexport.checkpoint import StudentSpec, TrainedStudent, open_checkpoint, save_checkpoint
from kdexport.config import BuildConfig, ExportSettings, SearchSettings
from kdexport.data.calibration_images import Calibration, CalibrationSettings
from kdexport.data.datasets import DatasetSpec
from kdexport.data.preprocessing import Preprocessing
from kdexport.graph.plan import PLAIN, Kept, LayerPlan, Scaling
from kdexport.students import STUDENTS
from kdexport.targets import Target, parse_targets
from tests.kdexport.build.given_steps import given_model

PREPROCESSING = Preprocessing(image_size=32, resize=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
TARGETS = parse_targets(["trt-rtx-fp32", "trt-fp16", "trt-bf16", "trt-rtx-int8"])
CALIBRATION = Calibration(
    settings=CalibrationSettings(),
    dataset=DatasetSpec(name="digits"),
    dataset_sha256="0",
    preprocessing=PREPROCESSING,
)
MODEL = given_model(Path("model.onnx"))


def student(folder: Path, seed: int) -> TrainedStudent:
    """One architecture, other weights."""
    torch.manual_seed(seed)
    spec = StudentSpec(
        student="mobilenetv2", classes=("a", "b"), preprocessing=PREPROCESSING, branches=None, provenance={}
    )
    save_checkpoint(folder, STUDENTS.build("mobilenetv2", num_classes=2, image_size=32), spec)
    return open_checkpoint(folder)


def keys(trained: TrainedStudent, **plans: LayerPlan) -> list[tuple[str, str]]:
    inputs = BuildInputs(
        trained=trained,
        dataset=CALIBRATION.dataset,
        dataset_sha256=CALIBRATION.dataset_sha256,
        targets=TARGETS,
        config=BuildConfig(student="mobilenetv2", recipe="digits"),
    )
    steps = declare(inputs, {form.replace("_", "-"): plan for form, plan in plans.items()})
    return [(step.stage, step.key) for step in steps.all()]


def test_two_students_of_one_architecture_share_no_result_and_no_engine(tmp_path: Path) -> None:
    first, second = keys(student(tmp_path / "a", 1)), keys(student(tmp_path / "b", 2))
    assert [stage for stage, _ in first].count("compile") == len(TARGETS)
    assert [stage for stage, _ in first] == [stage for stage, _ in second]
    assert not {key for _, key in first} & {key for _, key in second}
    assert keys(student(tmp_path / "c", 1)) == first


def test_one_changed_bit_of_a_weight_changes_the_key_of_the_engine(tmp_path: Path) -> None:
    first = student(tmp_path / "a", 1)
    changed = bytearray(first.weights.read_bytes())
    changed[-1] ^= 1
    first.weights.write_bytes(bytes(changed))
    second = open_checkpoint(tmp_path / "a")
    compiled = [{key for stage, key in keys(each) if stage == "compile"} for each in (first, second)]
    assert len(compiled[0]) == len(compiled[1]) == len(TARGETS)
    assert not compiled[0] & compiled[1]


def test_another_source_of_a_students_plugin_changes_every_key(tmp_path: Path) -> None:
    trained = student(tmp_path / "a", 1)
    sources = [{key for _, key in keys(replace(trained, plugin_sha256=source))} for source in ("", "1" * 64, "2" * 64)]
    assert not sources[0] & sources[1]
    assert not sources[1] & sources[2]


KEEP = LayerPlan(kept=(Kept("node_a", "a.weight"),))
SCALE = LayerPlan(equalised=(Scaling(("a.weight",), "b.weight", 1, (1, 2)),))


@pytest.mark.parametrize("plan", [KEEP, SCALE])
def test_a_precision_plan_changes_only_the_keys_of_its_own_form(tmp_path: Path, plan: LayerPlan) -> None:
    trained = student(tmp_path / "a", 1)
    plain, planned = keys(trained), keys(trained, int8_s8=plan)
    assert keys(trained, int8_u8=plan) == plain
    gone, new = set(plain) - set(planned), set(planned) - set(plain)
    calibrated = ["calibrate"] * (plan is SCALE)
    assert sorted(stage for stage, _ in gone) == [*calibrated, "cast", "compile"]
    assert sorted(stage for stage, _ in new) == [*calibrated, "cast", "compile"] + ["equalise"] * (plan is SCALE)


def test_every_number_of_a_scaling_changes_the_key() -> None:
    found = [SCALE, LayerPlan(equalised=(Scaling(("a.weight",), "b.weight", 1, (1, 3)),)), KEEP, PLAIN]
    assert len({stages.cast(MODEL, "int8-u8", CALIBRATION, plan).key for plan in found}) == len(found)


@pytest.mark.parametrize(
    "changes",
    [{"flips": 0.05}, {"top1_drop": 0.01}, {"noise": 0.1}, {"evaluations": 9}, {"images": 99}, {"enabled": True}],
)
def test_a_search_depends_on_its_limits_and_images(changes: dict[str, Any]) -> None:
    def key(**settings: Any) -> str:
        wanted = SearchSettings.model_validate({"enabled": True, **settings})
        config = BuildConfig(student="mobilenetv2", recipe="digits", precision_search=wanted)
        return search(MODEL, search_requests(TARGETS, config, CALIBRATION)["int8-s8"]).key

    assert (key() == key(**changes)) is (changes == {"enabled": True})


def engine_key(model: str = "m", target: Target = Target("trt", "fp16"), size: int = 32, **settings: Any) -> str:  # noqa: B008, a frozen value
    export = ExportSettings.model_validate(settings)
    return stages.compile_engine(given_model(Path("model.onnx"), model), target, export, size).key


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "n"},
        {"target": Target("trt", "bf16")},
        {"target": Target("trt-rtx", "fp16")},
        {"size": 64},
        {"opt_batch": 4},
        {"max_batch": 65},
        {"workspace_mb": 64},
        {"tf32": True},
        {"compute_capabilities": ["SM89"]},
    ],
)
def test_an_engine_depends_on_model_precision_shapes_and_builder_settings(changes: dict[str, Any]) -> None:
    assert engine_key() == engine_key(model="m")
    assert engine_key(**changes) != engine_key()


@pytest.mark.parametrize("key", [engine_key, lambda: TensorRT().timing_key()])
def test_an_engine_and_kernel_times_depend_on_gpu_driver_and_builder(monkeypatch: pytest.MonkeyPatch, key: Any) -> None:
    found = [key()]
    for gpu in (["NVRM 580.1", "Model: H100"], ["NVRM 580.2", "Model: H100"], ["NVRM 580.2", "Model: L4"]):
        monkeypatch.setattr(nvidia, "gpu_fingerprint", lambda gpu=gpu: gpu)
        found.append(key())
    for version in ("10.16.1", "11.4.0"):
        monkeypatch.setattr(trt, "tool_versions", lambda *names, version=version: dict.fromkeys(names, version))
        found.append(key())
    assert len(set(found)) == len(found) == 6


def test_an_engine_that_is_built_without_a_gpu_does_not_depend_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine_key(target=Target("trt-rtx", "fp16"))
    monkeypatch.setattr(nvidia, "gpu_fingerprint", lambda: ["NVRM 580.1", "Model: L4"])
    assert engine_key(target=Target("trt-rtx", "fp16")) == before
