"""`[quantize_aware]` in a build: the bundle, its verification from its own files, its keys, and bad input in words."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from safetensors.numpy import load_file, save_file

from kdexport.backends import backend
from kdexport.backends.base import CompileRequest, Execution, Runner
from kdexport.build.quantize_aware import Lesson
from kdexport.build.steps import BuildInputs, declare
from kdexport.bundle.manifest import MANIFEST, hash_files, read_golden, read_manifest
from kdexport.checkpoint import StudentSpec, open_checkpoint, save_checkpoint
from kdexport.config import BuildConfig, QuantizeAwareSettings
from kdexport.data.datasets import DatasetSpec, open_dataset
from kdexport.data.preprocessing import Preprocessing
from kdexport.diagnose.bisect import explain
from kdexport.graph.interface import without_interface
from kdexport.graph.plan import TRANSPOSED
from kdexport.students import STUDENTS
from kdexport.targets import parse_targets
from kdexport.verify.fake_quantized_checks import check_agreement
from kdexport.verify.rebuilt_files import IDENTICAL, rebuild_files
from kdexport.verify.rebuilt_graphs import RebuiltGraphs
from kdexport.verify.student_checks import student_checks
from kdexport.verify.verdict import replay
from tests.conftest import Command, made_once, run_command
from tests.kdexport.optional_packages import require_litert
from tests.kdexport.other_networks import CLASSES, pictures

ROOT = Path(__file__).parents[3]
TRAINED, ONNX = "student-int8-u8.safetensors", "targets/onnx-int8/model.onnx"
CONFIG = """
student = "tests.kdexport.other_networks:averaged_network"
targets = ["onnx-fp32", "onnx-int8"]

[preprocessing]
mean = [0.5, 0.4, 0.3]
std = [0.3, 0.25, 0.35]

[export]
input = "uint8-nchw"

[quantize_aware]
enabled = true
teacher = "student"
epochs = 2
batch_size = 16
learning_rate = 0.002

[verify]
images = 20
golden = 6

[latency]
sessions = 3
pairs = 10
max_slowdown = 0.9

# Few images and an untrained network: what is lost is for other tests.
[policy.D.int8]
flips = 0.5
top1_drop = 0.5
"""


def make(root: Path) -> None:
    for index, image in enumerate(pictures(10 * CLASSES, 5)):
        for split in ("train", "val"):
            folder = root / "data" / split / f"class{index % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index}.png")
    (root / "config.toml").write_text(CONFIG)
    done = run_command(*arguments(root, "bundle"), cwd=ROOT)
    assert done.exit_code in (0, 3), done.stderr


def arguments(root: Path, out: str) -> list[str]:
    return [
        "build", "--config", str(root / "config.toml"), "--weights", "own", "--image-size", "32",
        "--data", str(root / "data"), "--out", str(root / out), "--workspace", str(root / "ws"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "quantize_aware", make)


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "bundle", tmp_path / "bundle"))


def silent(_: str) -> None:
    pass


def failures(folder: Path) -> dict[tuple[str, str], str]:
    """The failed checks of a bundle whose manifest has the digests of its files."""
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**data, "files": hash_files(folder)}))
    verdict = replay(folder, read_manifest(folder), silent)
    return {(check.subject, check.name): check.detail for check in verdict.failures}


def test_only_int8_targets_have_the_trained_weights_and_the_certificate_is_stored(root: Path) -> None:
    bundle = root / "bundle"
    data = read_manifest(bundle).data
    folded, trained = (load_file(bundle / name) for name in ("student.safetensors", TRAINED))
    exported = {i.name: numpy_helper.to_array(i) for i in onnx.load(str(bundle / "model.onnx")).graph.initializer}
    assert folded.keys() == trained.keys()
    assert all(np.array_equal(exported[name], folded[name]) for name in folded)
    assert any(not np.array_equal(trained[name], folded[name]) for name in folded)
    assert "quantize_aware" not in data["targets"]["onnx-fp32"]
    entry = data["targets"]["onnx-int8"]["quantize_aware"]
    assert (entry["weights"], entry["teacher"], entry["epochs"]) == (TRAINED, "student", 2)
    assert TRAINED in data["files"]
    found = {c["name"]: c for c in data["parity"] if c["subject"] == f"{ONNX} against its fake-quantized graph"}
    assert {name: check["allowed"] for name, check in found.items()} == {"rms error": 3.0, "max error": 4.0}
    assert all(check["measured"] < 1 for check in found.values())


def test_the_bundle_alone_proves_its_int8_file_and_makes_it_again(root: Path) -> None:
    bundle = root / "bundle"
    manifest = read_manifest(bundle)
    verdict = replay(bundle, manifest, silent)
    assert not verdict.failures
    assert ("C", f"{ONNX} against its fake-quantized graph") in {(c.rung, c.subject) for c in verdict.checks}
    rebuilt = rebuild_files(bundle, manifest, None, silent)
    assert {file.name: file.outcome for file in rebuilt}[ONNX] == IDENTICAL
    assert explain(bundle, manifest, bundle.parent / "explained", silent) is None


def change_weights(folder: Path) -> None:
    tensors = load_file(folder / TRAINED)
    tensors["second.weight"][3, 2] *= 1.5
    save_file(tensors, folder / TRAINED)


def take_folded_weights(folder: Path) -> None:
    shutil.copyfile(folder / "student.safetensors", folder / TRAINED)


def change_scale(folder: Path) -> None:
    model = onnx.load(str(folder / ONNX))
    item = next(i for i in model.graph.initializer if i.name.endswith("_scale") and not i.dims and "bias" not in i.name)
    item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item) * np.float32(1.5), item.name))
    onnx.save(model, str(folder / ONNX))


@pytest.mark.parametrize("change", [change_weights, take_folded_weights, change_scale])
def test_weights_or_scales_that_were_not_trained_together_are_found(change: Callable[[Path], None], copy: Path) -> None:
    change(copy)
    assert "differ" in failures(copy)[ONNX, "graph as rebuilt"]


def test_weights_of_another_student_are_refused(copy: Path) -> None:
    tensors = load_file(copy / TRAINED)
    save_file({name: values for name, values in tensors.items() if name != "head.bias"}, copy / TRAINED)
    assert f"{TRAINED} does not fit the model: 1 tensors missing" in failures(copy)["student", "readable"]


class Swapped(Runner):
    """The int8 file with its first two classes swapped."""

    def __init__(self, logits: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
        self._logits = logits

    @property
    def execution(self) -> Execution:
        return Execution(runtime="none", version="0", device="cpu")

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._logits(images)[:, [1, 0, *range(2, CLASSES)]]


def test_a_file_that_computes_something_else_than_was_trained_fails_the_certificate(root: Path, tmp_path: Path) -> None:
    from kdexport.verify.target_checks import open_file

    bundle = root / "bundle"
    manifest = read_manifest(bundle)
    _, context = student_checks(bundle, manifest, read_golden(bundle, manifest))
    assert context is not None
    rebuilt = RebuiltGraphs(bundle, manifest, tmp_path, context.fused)
    runner = Swapped(open_file(bundle / ONNX, "int8-u8").logits)
    checks = check_agreement(context, ONNX, "int8-u8", runner, rebuilt)
    assert [(check.name, check.holds) for check in checks] == [("rms error", False), ("max error", False)]


def test_a_second_build_does_nothing_and_another_schedule_trains_again(root: Path) -> None:
    done = run_command(*arguments(root, "bundle"), cwd=ROOT)
    assert done.exit_code in (0, 3)
    assert "Nothing to do" in done.stdout
    inputs = step_inputs(root)
    assert inputs.lesson is not None
    longer = replace(inputs, lesson=replace(inputs.lesson, settings=QuantizeAwareSettings(epochs=9, teacher="student")))
    plain = replace(inputs, lesson=None)
    keys = {
        name: {str(target): step.key for target, step in declare(given).casts.items()}
        for name, given in (("trained", inputs), ("longer", longer), ("plain", plain))
    }
    assert len({found["onnx-int8"] for found in keys.values()}) == 3
    # The float targets are what they are without it.
    for name in ("onnx-fp32", "openvino-bf16"):
        assert len({found[name] for found in keys.values()}) == 1
    assert [step.stage for step in declare(plain).all() if step.stage == "quantize-aware"] == []
    assert len(declare(inputs).quantize_aware) == 2


def test_targets_of_phones_are_compiled_from_the_trained_graph_of_their_form(root: Path) -> None:
    names = {"litert-int8": "int8-u8", "executorch-int8": "int8-u8", "ncnn-int8": "int8-s8", "litert-fp32": ""}
    steps = declare(replace(step_inputs(root), targets=parse_targets(list(names))))
    assert set(steps.quantize_aware) == {"int8-u8", "int8-s8"}
    for target, engine in steps.engines.items():
        made_of = {step.key for step in engine.steps() if step.stage == "quantize-aware"}
        form = names[str(target)]
        assert made_of == ({steps.quantize_aware[form].key} if form else set())


def test_a_file_of_litert_has_the_trained_levels(root: Path, tmp_path: Path) -> None:
    require_litert()
    from kdexport.backends.litert_content import layers_of
    from kdexport.backends.litert_files import read_model

    bundle, runtime = root / "bundle", backend("litert")
    path = tmp_path / "model.onnx"
    onnx.save(without_interface(onnx.load(str(bundle / ONNX))), str(path))
    runtime.compile(CompileRequest(onnx=path, folder=tmp_path, precision="int8", image_size=32, batches=(1, 1, 1)))
    assert [finding for finding in runtime.audit(tmp_path, "int8", ()) if not finding.holds] == []
    folded, trained = (load_file(bundle / name) for name in ("student.safetensors", TRAINED))
    changed = 0
    for layer in layers_of(read_model((tmp_path / runtime.artifact).read_bytes())):
        name = layer.name.removesuffix(TRANSPOSED)
        levels, stored = layer.weight.values, layer.weight
        assert levels is not None
        wide = np.moveaxis(levels.astype(np.float64), stored.axis, -1) * stored.scales.astype(np.float64)
        # LiteRT has the inputs of a convolution last: (outputs, height, width, inputs).
        wide = np.moveaxis(np.moveaxis(wide, -1, 0), -1, 1)
        assert wide.shape == trained[name].shape
        step = stored.scales.max()
        assert np.abs(wide - trained[name]).max() <= 0.501 * step
        changed += bool(np.abs(wide - folded[name]).max() > step)
    assert changed


def not_trained(_job: Path, _out: Path) -> None:
    raise AssertionError


def step_inputs(root: Path) -> BuildInputs:
    settings = QuantizeAwareSettings(enabled=True, teacher="student")
    return BuildInputs(
        trained=open_checkpoint(next((root / "ws" / "import").glob("[!.]*"))),
        dataset=DatasetSpec(name="digits"),
        dataset_sha256="0",
        targets=parse_targets(["onnx-fp32", "onnx-int8", "openvino-bf16", "trt-rtx-int8"]),
        config=BuildConfig(student="x:y"),
        lesson=Lesson(settings=settings, recipe="", overrides={}, material=(), train=not_trained),
    )


@pytest.mark.parametrize(
    ("lines", "message", "remedy"),
    [
        ('teacher = "student"', "needs an int8 target; the targets are onnx-fp32.", "Add one, for example onnx-int8"),
        ('teacher = "recipe"', "has no teacher: this student has no recipe that names one.", 'Set teacher = "student"'),
        ("[precision_search]\nenabled = true", "the precision search are both enabled", "[precision_search] or under"),
        ("epochs = 0", "quantize_aware.epochs = 0 (int): input should be greater than or equal to 1.", "Correct"),
        ('teacher = "resnet"', "quantize_aware.teacher = 'resnet' (str): input should be 'recipe' or 'student'", ""),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    lines: str, message: str, remedy: str, here: Command, tmp_path: Path
) -> None:
    int8 = "needs an int8" not in message
    (tmp_path / "c.toml").write_text(
        f'student = "tests.kdexport.other_networks:averaged_network"\ntargets = ["onnx-{"int8" if int8 else "fp32"}"]\n'
        f"[quantize_aware]\nenabled = true\n{lines}\n"
    )
    done = here("build", "--config", tmp_path / "c.toml", "--out", tmp_path / "out", "--workspace", tmp_path / "ws")
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert remedy in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_student_whose_teacher_is_not_in_the_workspace_is_told_how_to_get_one(here: Command, tmp_path: Path) -> None:
    preprocessing = Preprocessing(image_size=32, resize=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    spec = StudentSpec(
        student="mobilenetv2",
        classes=open_dataset(DatasetSpec(name="digits"), "test").classes,
        preprocessing=preprocessing,
        branches=None,
        provenance={},
    )
    save_checkpoint(tmp_path / "student", STUDENTS.build("mobilenetv2", num_classes=10, image_size=32), spec)
    (tmp_path / "c.toml").write_text(
        'student = "mobilenetv2"\nrecipe = "digits"\ntargets = ["onnx-int8"]\n[quantize_aware]\nenabled = true\n'
    )
    done = here(
        "build", "--config", tmp_path / "c.toml", "--checkpoint", tmp_path / "student", "--out", tmp_path / "out",
        "--workspace", tmp_path / "ws",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "Quantize-aware training has no weights of the teacher" in done.stderr
    assert "--teacher-checkpoint" in done.stderr
