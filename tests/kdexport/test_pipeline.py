"""A build does only what is not done, survives a kill at any moment, and never leaves half a bundle."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from tests.conftest import CONFIG, Built, Command


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if ".partial" in path.name or path.name.endswith((".new", ".old"))]


def test_a_second_build_does_nothing_in_the_processor_time_of_two_imports_of_torch(
    built: Built, kdexport: Command
) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.bundle.rglob("*")}
    # Seconds of processor time, which other processes do not lengthen as they do those on a clock.
    best = 100.0
    for _ in range(2):
        started = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = kdexport(
            "build", "--config", built.config, "--out", built.bundle, "--workspace", built.workspace,
            "--target", "onnx-fp32,trt-rtx-fp16",
        )  # fmt: skip
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime)
        assert done.exit_code == 0
        assert "Nothing to do" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in built.bundle.rglob("*")} == before
    # A build that exports or verifies anything takes tens of seconds; the unit follows the speed of the machine.
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert best < 2 * (ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime)


def test_a_damaged_bundle_is_replaced_from_the_workspace(built: Built, bundle_copy: Path, kdexport: Command) -> None:
    expected = tree(bundle_copy)
    (bundle_copy / "student.safetensors").write_bytes(b"x")
    (bundle_copy / "targets" / "onnx-fp32" / "model.onnx").unlink()
    (bundle_copy / "stray.txt").write_text("not part of it")
    done = kdexport(
        "build", "--config", built.config, "--out", bundle_copy, "--workspace", built.workspace,
        "--target", "onnx-fp32,trt-rtx-fp16",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert tree(bundle_copy) == expected
    assert leftovers(bundle_copy.parent) == []


def test_a_folder_that_is_no_bundle_is_not_touched(built: Built, here: Command, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("unsaved")
    done = here("build", "--config", built.config, "--out", out, "--workspace", built.workspace)
    assert done.exit_code == 2
    assert "KDX202" in done.stderr
    assert tree(out) == {"thesis.tex": hashlib.sha256(b"unsaved").hexdigest()}


def test_an_existing_bundle_stays_when_the_new_build_fails(
    built: Built, bundle_copy: Path, here: Command, tmp_path: Path
) -> None:
    before = tree(bundle_copy)
    checkpoint = Path(shutil.copytree(built.checkpoint, tmp_path / "checkpoint"))
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = here(
        "build", "--config", built.config, "--checkpoint", checkpoint, "--out", bundle_copy,
        "--workspace", tmp_path / "ws",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "KDX200" in done.stderr
    assert "truncated" in done.stderr
    assert tree(bundle_copy) == before


def test_a_wrong_graph_in_the_workspace_is_never_published(built: Built, here: Command, tmp_path: Path) -> None:
    workspace = Path(shutil.copytree(built.workspace, tmp_path / "ws"))
    shutil.rmtree(workspace / "bundle")
    exported = next((workspace / "export").glob("*/model.onnx"))
    model = onnx.load(exported)
    item = next(i for i in model.graph.initializer if i.name == "blocks.2.1.conv.0.weight")
    changed = numpy_helper.to_array(item).copy()
    changed.flat[5] *= 1.01
    item.CopyFrom(numpy_helper.from_array(changed, item.name))
    onnx.save(model, exported)
    out = tmp_path / "out"
    done = here("build", "--config", built.config, "--out", out, "--workspace", workspace)
    assert done.exit_code == 4
    assert f"The stored result {exported.parent} is damaged: model.onnx changed since it was made." in done.stderr
    # With its digests changed too, as if the exporter had written it.
    exported.parent.with_name(f".sha256-{exported.parent.name}.json").unlink()
    done = here("build", "--config", built.config, "--out", out, "--workspace", workspace, "--blame")
    assert done.exit_code == 1
    assert "layer blocks.2.1.conv.0.weight (1 of " in done.stderr
    assert "Blamed: stage export: Conv node" in done.stderr
    assert "values of blocks.2.1.conv.0.weight differ" in done.stderr
    assert not out.exists()
    report = next((workspace / "failed").glob("*/report.md"))
    assert str(report) in done.stderr
    assert "FAILS" in report.read_text()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("classes", ["KDX200", "9 classes", "10"]),
        ("pickle", ["KDX200", "safetensors"]),
    ],
)
def test_a_bad_checkpoint_is_refused_with_its_reason(
    damage: str, words: list[str], built: Built, here: Command, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(built.checkpoint, tmp_path / "checkpoint"))
    spec = checkpoint / "student.json"
    if damage == "classes":
        spec.write_text(spec.read_text().replace('    "9"\n', "").replace('    "8",\n', '    "8"\n'))
    else:
        (checkpoint / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n.")
    done = here(
        "build", "--config", built.config, "--checkpoint", checkpoint, "--out", tmp_path / "out",
        "--workspace", tmp_path / "ws",
    )  # fmt: skip
    assert done.exit_code == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_no_room_for_the_bundle_is_said_and_leaves_nothing(built: Built, tmp_path: Path) -> None:
    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    workspace = Path(shutil.copytree(built.workspace, tmp_path / "ws"))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "kdexport", "build", "--config", str(built.config), "--out", str(out),
               "--workspace", str(workspace), "--target", "onnx-fp32,trt-rtx-fp16"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit_files)
    assert done.returncode == 4, done.stderr
    assert "KDX401" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("out", ["/dev/null/bundle", "/proc/bundle"])
def test_an_output_that_cannot_be_written_is_known_before_training(
    out: str, built: Built, here: Command, tmp_path: Path
) -> None:
    done = here("build", "--config", built.config, "--out", out, "--workspace", tmp_path / "ws")
    assert done.exit_code == 4, done.stderr
    assert "KDX401" in done.stderr
    assert not (tmp_path / "ws" / "train").exists()


def test_a_killed_build_continues_and_ends_with_the_same_student(built: Built, tmp_path: Path) -> None:
    workspace, out = tmp_path / "ws", tmp_path / "bundle"
    # The kill of a training has tests of its own.
    for stage in ("teacher", "train"):
        if (built.workspace / stage).is_dir():
            shutil.copytree(built.workspace / stage, workspace / stage)
    command = [sys.executable, "-m", "kdexport", "build", "--config", str(built.config), "--out", str(out),
               "--workspace", str(workspace), "--target", "onnx-fp32,trt-rtx-fp16"]  # fmt: skip
    rng = np.random.default_rng()
    for attempt in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=float(rng.uniform(1.0, 12.0)) if attempt < 2 else 600)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert not out.exists() or (out / "manifest.json").is_file()
    assert process.returncode == 0
    for name in ("unfused.safetensors", "student.safetensors", "model.onnx", "targets/trt-rtx-fp16/model.plan"):
        assert (out / name).read_bytes() == (built.bundle / name).read_bytes(), name
    assert leftovers(tmp_path) == []


def test_a_killed_build_takes_its_training_process_with_it(tmp_path: Path) -> None:
    config = tmp_path / "long.toml"
    config.write_text(CONFIG.replace("epochs = 1\nbatch", "epochs = 500\nbatch"))
    command = [sys.executable, "-m", "kdexport", "build", "--config", str(config), "--out", str(tmp_path / "out"),
               "--workspace", str(tmp_path / "ws")]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (children := _training_processes(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert children
    time.sleep(2.0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while _training_processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _training_processes(tmp_path) == []


def _training_processes(marker: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "-m training" in line and str(marker) in line:
            found.append(line)
    return found


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    root = tmp_path / "images"
    for split, count in (("train", 24), ("val", 9)):
        for label, name in enumerate(("ant", "bee", "wasp")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                noise = rng.integers(0, 120, (37 + index % 3, 41, 3))
                noise[..., label] += 130
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{index:02d}.png")
    return root


FOLDER_CONFIG = """
student = "mobilenetv2"
targets = ["onnx-fp32"]
recipe = "digits"
[overrides.data]
name = "folder:{root}"
image_size = 40
resize = 44
flip = true
[overrides.train]
epochs = 1
batch_size = 24
warmup_epochs = 0.5
[overrides.teacher]
epochs = 1
plausibility = "reported"
[overrides.distiller]
ramp_epochs = 0.5
placement = "R2"
num_branches = 2
permutation = "expected"
[verify]
images = 20
golden = 5
[latency]
sessions = 3
pairs = 10
max_slowdown = 0.9
"""


def test_an_image_folder_with_adapters_that_fold_into_the_classifier_builds_and_verifies(
    image_folder: Path, kdexport: Command, here: Command, tmp_path: Path
) -> None:
    config = tmp_path / "folder.toml"
    config.write_text(FOLDER_CONFIG.format(root=image_folder))
    out = tmp_path / "out"
    done = kdexport("build", "--config", config, "--out", out, "--workspace", tmp_path / "ws", "--json")
    assert done.exit_code == 0, done.stderr
    assert done.data["operators"]["fused"]["Conv"] == 53
    originals = {path.read_bytes() for path in image_folder.rglob("*.png")}
    assert all(path.read_bytes() in originals for path in (out / "golden").glob("*.png"))
    everything = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert str(tmp_path).encode() not in everything
    assert here("verify", out).exit_code == 0


@pytest.mark.parametrize("fault", ["corrupt", "empty class"])
def test_a_bad_image_folder_is_named(fault: str, image_folder: Path, here: Command, tmp_path: Path) -> None:
    config = tmp_path / "folder.toml"
    config.write_text(FOLDER_CONFIG.format(root=image_folder))
    victim = image_folder / "train" / "bee"
    if fault == "corrupt":
        victim = victim / "03.png"
        victim.write_bytes(victim.read_bytes()[:300])
    else:
        shutil.rmtree(victim)
        victim.mkdir()
    done = here("build", "--config", config, "--out", tmp_path / "out", "--workspace", tmp_path / "ws")
    assert done.exit_code == 2, done.stderr
    assert "KDX201" in done.stderr
    assert str(victim) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('recipe = "digits"\nepoch = 3\n', ["unknown key 'epoch'"]),
        ('recipe = "digits"\n[verify]\nimage = 3\n', ["unknown key 'verify.image'", "images"]),
        ('recipe = "digits"\n[verify]\nimages = "many"\n', ["verify.images = 'many' (str)"]),
        ('recipe = "digts"\n', ["KDX100", "digits"]),
        ('recipe = "digits"\n[overrides.train]\nepoch = 3\n', ["unknown key 'train.epoch'", "epochs"]),
        ('recipe = "digits"\n[overrides.teacher]\nname = "resnet57"\n', ["KDX101", "resnet56"]),
        ('recipe = "digits"\n[overrides.data]\nname = "digitz"\n', ["digits"]),
        ("recipe = digits\n", ["not valid TOML", "line"]),
    ],
)
def test_a_wrong_configuration_is_refused_with_the_nearest_name(
    change: str, words: list[str], here: Command, tmp_path: Path
) -> None:
    config = tmp_path / "wrong.toml"
    config.write_text(f'student = "mobilenetv2"\n{change}')
    done = here("build", "--config", config, "--out", tmp_path / "out", "--workspace", tmp_path / "ws")
    assert done.exit_code == 2, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_manifest_of_its_own_is_not_replaced(built: Built, here: Command, tmp_path: Path) -> None:
    web = tmp_path / "web"
    web.mkdir()
    (web / "manifest.json").write_text('{"name": "an app"}')
    (web / "precious.txt").write_text("unsaved")
    before = tree(web)
    done = here("build", "--config", built.config, "--out", web, "--workspace", built.workspace)
    assert done.exit_code == 2
    assert tree(web) == before


def test_a_module_of_the_user_is_not_run_in_the_place_of_ours(kdexport: Command, tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text("raise SystemExit('mine')")
    done = kdexport("list", "teachers", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "resnet56" in done.stdout


def test_a_damaged_result_in_the_workspace_is_made_again(built: Built, here: Command, tmp_path: Path) -> None:
    workspace = Path(shutil.copytree(built.workspace, tmp_path / "ws"))
    kept = next((workspace / "bundle").glob("*/model.onnx"))
    kept.write_bytes(kept.read_bytes()[:-1])
    out = tmp_path / "out"
    done = here("build", "--config", built.config, "--out", out, "--workspace", workspace, "--target",
                "onnx-fp32,trt-rtx-fp16")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert (out / "model.onnx").read_bytes() == (built.bundle / "model.onnx").read_bytes()
