"""Which stages of a build may rerun after a change of kdexport's own code, and which results ``--fresh`` forgets."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdexport.backends import nvidia
from kdexport.build.steps import BuildInputs, bundle, declare, known_steps
from kdexport.checkpoint import StudentSpec, open_checkpoint, save_checkpoint
from kdexport.config import BuildConfig
from kdexport.core.import_graph import ROOT, source_digest
from kdexport.data.datasets import DatasetSpec
from kdexport.data.preprocessing import Preprocessing
from kdexport.graph.plan import Kept, LayerPlan, Scaling
from kdexport.students import STUDENTS
from kdexport.targets import parse_targets
from kdexport.workspace import Step, Workspace

TARGETS = ["onnx-fp32", "onnx-int8", "openvino-bf16", "trt-rtx-fp16", "trt-rtx-int8"]
PLAN = LayerPlan(
    kept=(Kept("node_a", "a.weight"),), equalised=(Scaling(("a.weight",), "b.weight", 1, (1, 2)),)
)  # fmt: skip


def build_inputs(folder: Path, targets: list[str] = TARGETS, **config: Any) -> BuildInputs:
    preprocessing = Preprocessing(image_size=32, resize=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    spec = StudentSpec(
        student="mobilenetv2", classes=("a", "b"), preprocessing=preprocessing, branches=None, provenance={"recipe": 1}
    )
    if not folder.is_dir():
        torch.manual_seed(1)
        save_checkpoint(folder, STUDENTS.build("mobilenetv2", num_classes=2, image_size=32), spec)
    given = {"student": "mobilenetv2", "recipe": "digits", "precision_search": {"enabled": True}, **config}
    return BuildInputs(
        trained=open_checkpoint(folder),
        dataset=DatasetSpec(name="digits"),
        dataset_sha256="0",
        targets=parse_targets(targets),
        config=BuildConfig.model_validate(given),
    )


def the_bundle(inputs: BuildInputs) -> Step[Any]:
    return bundle(inputs, lambda error, _making: error)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> BuildInputs:
    return build_inputs(tmp_path_factory.mktemp("student") / "checkpoint")


@pytest.fixture(scope="module")
def every_step(inputs: BuildInputs) -> list[Step[Any]]:
    """All stages, with a search that found what to scale and what to keep; each step after what it is made of."""
    found = declare(inputs, {"int8-u8": PLAN, "int8-s8": PLAN}).all()
    return [*found, the_bundle(inputs)]


def reruns(every_step: list[Step[Any]], root: Path) -> str:
    """Stages that have another key where the code of kdexport is that below ``root``, in the order of a build."""
    stale: dict[str, str] = {}
    for step in every_step:
        own = source_digest(step.code, *step.modules, root=root) != source_digest(step.code, *step.modules)
        if own or any(each.key in stale for each in step.made_of if isinstance(each, Step)):
            stale[step.key] = step.stage
    order = ("fuse", "export", "calibrate", "search", "equalise", "cast", "compile", "bundle")
    return " ".join(stage for stage in order if stage in stale.values())


FUSE = "fuse export calibrate search equalise cast compile bundle"
EXPORT = FUSE.removeprefix("fuse ")
CALIBRATE = "calibrate search cast compile bundle"
EQUALISE = "calibrate search equalise cast compile bundle"
#: What may rerun after a change of a file, or of every file of a package.
TABLE = {
    "__init__.py": FUSE,
    "__main__.py": "",
    "cli.py": "",
    "api.py": "",
    "inference": "",
    "report": "bundle",
    "pipeline.py": "",
    "workspace.py": "",
    "errors.py": "",
    "registry.py": FUSE,
    "plugins.py": FUSE,
    "config.py": "bundle",
    "targets.py": "compile bundle",
    "checkpoint.py": FUSE,
    "commands": "",
    "diagnose": "",
    "gate": "",
    "serving": "",
    "sharing": "",
    "timing": "bundle",
    "verify": "bundle",
    "build/package.py": "bundle",
    "build/train.py": "",
    "bundle/manifest.py": "bundle",
    "bundle/layout.py": FUSE,
    "precision_search": "search bundle",
    "stats/logits.py": CALIBRATE,
    "stats/paired.py": "bundle",
    "stats/proportions.py": "bundle",
    "stats/sequential.py": "bundle",
    "stats/scores.py": "bundle",
    "graph/export.py": EXPORT,
    "graph/audit.py": EXPORT,
    "graph/precision.py": EXPORT,
    "graph/tensor_ranges.py": EXPORT,
    "graph/quantize.py": CALIBRATE,
    # Ranges are measured again of what was scaled.
    "graph/equalise.py": EQUALISE,
    "graph/trace.py": EQUALISE,
    "backends/ort.py": EXPORT,
    "backends/trt.py": "compile bundle",
    "backends/trt_build.py": "compile bundle",
    "backends/plan_content.py": "compile bundle",
    "backends/openvino.py": "bundle",
    # No target here is of these.
    "backends/ncnn.py": "",
    "backends/executorch.py": "",
    "core/child.py": "compile bundle",
    "core/console.py": "",
    "core/digests.py": FUSE,
    "core/files.py": "",
    "core/import_graph.py": "",
    "core/progress.py": "",
    "core/tables.py": "bundle",
    "core/toml.py": CALIBRATE,
    # Networks and weights of other origins are read before the first step.
    "origins/libraries.py": "",
    "origins/weights.py": "",
    "data/datasets.py": CALIBRATE,
    "data/calibration_images.py": CALIBRATE,
    "data/preprocessing.py": FUSE,
    "data/uploads.py": "bundle",
    "data/resampling.py": FUSE,
    "data/exif_and_alpha.py": FUSE,
    "students/mobilenetv2.py": FUSE,
    "students/student.py": FUSE,
    "students/resnet18.py": "",
    "reparam/fold_student.py": FUSE,
    "reparam/algebra.py": FUSE,
    # Networks of other origins are merged in their graph, and stored as a program.
    "reparam/program.py": FUSE,
    "origins/stored_program.py": FUSE,
    # What only `kdexport fuse` takes.
    "origins/sources.py": "",
}


@pytest.fixture
def changed_code(tmp_path: Path) -> Callable[[str, str], Path]:
    """``changed_code("serving", "x = 1")``: a copy of kdexport with a line more in each file of a package."""

    def change(place: str, line: str) -> Path:
        copy = Path(shutil.copytree(ROOT / "kdexport", tmp_path / "kdexport", ignore=shutil.ignore_patterns("*.pyc")))
        files = [copy / place] if place.endswith(".py") else sorted((copy / place).rglob("*.py"))
        assert files
        for path in files:
            path.write_text(f"{path.read_text()}\n{line}\n")
        return tmp_path

    return change


@pytest.mark.parametrize(("place", "expected"), TABLE.items(), ids=TABLE)
def test_a_change_of_code_reruns_what_can_depend_on_it_and_nothing_else(
    place: str, expected: str, every_step: list[Step[Any]], changed_code: Callable[[str, str], Path]
) -> None:
    assert reruns(every_step, changed_code(place, "_changed = 1\nassert _changed")) == expected


def test_the_table_has_a_row_of_each_package_and_of_each_file_beside_them() -> None:
    found = {path.name for path in (ROOT / "kdexport").iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert {row.partition("/")[0] for row in TABLE} == found


@pytest.mark.parametrize("place", ["serving", "reparam", "backends", "build", "graph", "verify"])
def test_a_docstring_or_a_comment_reruns_nothing(
    place: str, every_step: list[Step[Any]], changed_code: Callable[[str, str], Path]
) -> None:
    assert reruns(every_step, changed_code(place, '"""Another word."""\n# And why.')) == ""


def test_a_change_of_one_stage_beside_the_others_reruns_what_follows_it(
    every_step: list[Step[Any]], tmp_path: Path
) -> None:
    for number, (old, new, expected) in enumerate(
        (
            ("save_tensors(making.folder / FUSED, result", "save_tensors(making.folder / FUSED, 0 or result", FUSE),
            ("size = spec.image_size", "size = int(spec.image_size)", EXPORT),
            ("calibration.batches()", "list(calibration.batches())", CALIBRATE),
            ("onnx.save(apply_scalings", "onnx.save_model(apply_scalings", EQUALISE),
            ("kept=tuple(given.plan.nodes)", "kept=(*given.plan.nodes,)", "compile bundle"),
        )
    ):
        copy = Path(shutil.copytree(ROOT / "kdexport", tmp_path / str(number) / "kdexport"))
        path = copy / "build" / "stages.py"
        assert path.read_text().count(old) == 1, old
        path.write_text(path.read_text().replace(old, new))
        assert reruns(every_step, copy.parent) == expected


@pytest.mark.parametrize(
    "config",
    [
        {"policy": {"B": {"max_error": 5.0}}},
        {"verify": {"images": 16}},
        {"latency": {"pairs": 20}},
        {"export": {"max_batch": 32}},
        {"calibration": {"images": 20}},
        {"precision_search": {"enabled": True, "flips": 0.01}},
        {"precision_search": {"enabled": False}},
        {"student": "resnet18"},
    ],
    ids=str,
)
def test_the_key_of_a_bundle_depends_on_every_setting(config: dict[str, Any], inputs: BuildInputs) -> None:
    folder = inputs.trained.weights.parent
    assert the_bundle(build_inputs(folder)).key == the_bundle(inputs).key
    assert the_bundle(build_inputs(folder, **config)).key != the_bundle(inputs).key


def test_the_key_of_a_bundle_depends_on_its_targets_its_data_and_what_runs_here(
    inputs: BuildInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = inputs.trained.weights.parent
    found = [the_bundle(inputs).key, the_bundle(build_inputs(folder, TARGETS[:-1])).key]
    found.append(the_bundle(build_inputs(folder, ["onnx-fp32"], calibration={"images": 20})).key)
    # What only int8 reads is nothing to a bundle without int8.
    assert the_bundle(build_inputs(folder, ["onnx-fp32"])).key == found[-1]
    monkeypatch.setattr("kdexport.workspace.tool_versions", lambda *names: dict.fromkeys(names, "other"))
    found.append(the_bundle(inputs).key)
    monkeypatch.undo()
    monkeypatch.setattr(nvidia, "gpu_fingerprint", lambda: ["NVRM 580.1", "Model: L4"])
    found.append(the_bundle(inputs).key)
    assert len(set(found)) == len(found)


def finished(workspace: Workspace, steps: tuple[Step[Any], ...]) -> dict[str, int]:
    kept = [step.stage for step in steps if workspace.has(step.stage, step.key)]
    return {stage: kept.count(stage) for stage in dict.fromkeys(kept)}


def test_fresh_forgets_the_results_of_this_build_and_no_others(tmp_path: Path) -> None:
    workspace, folder = Workspace(tmp_path / "ws"), tmp_path / "checkpoint"
    mine, plain = build_inputs(folder), build_inputs(folder, precision_search={"enabled": False})
    searched = declare(mine, {"int8-u8": PLAN})
    for step in {each.key: each for each in (*searched.all(), *declare(plain).all())}.values():
        workspace.path(step.stage, step.key).mkdir(parents=True)
    # The search of one form has ended, that of the other one has not.
    (done,) = (step for form, step in searched.searches.items() if form == "int8-u8")
    (workspace.path("search", done.key) / "plan.json").write_text(json.dumps(PLAN.to_json()))
    shutil.rmtree(workspace.path("search", searched.searches["int8-s8"].key))
    known = known_steps(mine, workspace)
    assert finished(workspace, known) == {
        # Each form has ranges of its own, and so has what was scaled.
        "fuse": 1, "export": 1, "calibrate": 3, "search": 1, "equalise": 1, "cast": 3, "compile": 1,
    }  # fmt: skip
    for step in known:
        workspace.forget(step.stage, step.key)
    # Left: int8 of the build without a search, for CPUs and for GPUs, and the engine of the latter.
    assert finished(workspace, declare(plain).all()) == {"cast": 2, "compile": 1}
