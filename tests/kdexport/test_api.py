"""``import kdexport`` as a user has it: four functions, lazy and typed."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import kdexport
from kdexport import api
from kdexport.errors import ConfigError, ReparamError
from tests.conftest import Built, Command


def test_everything_that_is_offered_is_there_and_documented() -> None:
    for name in ("build", "fuse", "gate", "load"):
        function = getattr(kdexport, name)
        assert callable(function)
        assert inspect.signature(function) == inspect.signature(getattr(api, name))
        assert (getattr(api, name).__doc__ or "").strip()
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        kdexport.train  # noqa: B018


def test_the_packages_of_two_of_these_names_stay_packages() -> None:
    code = (
        "import kdexport, kdexport.build.stages, kdexport.gate.result\n"
        "assert kdexport.build.stages and kdexport.gate.result\n"
        "from kdexport import build, errors\n"
        "try: build()\n"
        "except errors.ConfigError as error: print(error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Neither --student nor --config was given."


def test_a_build_that_is_up_to_date_returns_its_bundle(built: Built, capfd: pytest.CaptureFixture[str]) -> None:
    found = kdexport.build(
        config=built.config,
        targets=["onnx-fp32", "trt-rtx-fp16"],
        out=built.bundle,
        workspace=built.workspace,
        quiet=True,
    )
    assert found.folder == built.bundle
    assert len(found.predict(built.bundle / "golden")) == 9
    assert capfd.readouterr().err == ""


def test_wrong_arguments_are_the_errors_of_the_commands(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        kdexport.build(config=tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="--weights is for students of another origin"):
        kdexport.build("mobilenetv2", weights="DEFAULT")


def test_a_module_is_fused_and_stays_as_it_is() -> None:
    import torch
    from torch import nn

    torch.manual_seed(3)
    norm = nn.BatchNorm2d(5)
    norm.running_mean, norm.running_var = torch.randn(5), torch.rand(5) + 0.5
    module = nn.Sequential(nn.Conv2d(3, 5, 3), norm, nn.ReLU()).eval()
    images = torch.randn(2, 3, 9, 9)
    fused = kdexport.fuse(module, [images])
    assert torch.allclose(fused.module(images), module(images), atol=1e-5)
    assert isinstance(module[1], nn.BatchNorm2d)
    with pytest.raises(ReparamError):
        kdexport.fuse(module.train(), [images])


def test_predict_prints_a_table_csv_or_json_and_names_bad_files(built: Built, here: Command, tmp_path: Path) -> None:
    good, bad = built.bundle / "golden" / "000.png", tmp_path / "bad, file.jpg"
    bad.write_bytes(b"no image")
    label = kdexport.load(built.bundle).predict(good)[0].label
    done = here("predict", built.bundle, good, "--top", "2")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[1].split()[-2] == label
    done = here("predict", built.bundle, good, bad, tmp_path / "gone.png", "--csv")
    assert done.exit_code == 2
    assert done.stdout.splitlines()[0] == "file,rank,label,probability"
    assert done.stdout.splitlines()[1].split(",")[1:3] == ["1", label]
    assert "2 of 3 images cannot be read; the others were answered." in done.stderr
    assert "bad, file.jpg" in done.stderr
    assert "gone.png" in done.stderr
    done = here("predict", built.bundle, bad, good, "--json")
    assert (done.exit_code, done.answer["command"]) == (2, "predict")
    assert [item["label"] for item in done.data["predictions"]] == [label]
    assert done.data["refused"][0]["source"] == str(bad)


def test_evaluate_shows_what_is_measured_with_intervals(built: Built, here: Command) -> None:
    pytest.importorskip("sklearn")
    done = here("evaluate", built.bundle, "--data", "digits", "--json")
    assert done.exit_code == 0, done.stderr
    assert done.data["images"] == 360
    task = kdexport.load(built.bundle).manifest.data["task"]["files"]["model.onnx"]
    assert done.data["top1"]["value"] == pytest.approx(task["top1"], abs=1 / 360)
    assert done.data["top1"]["low"] < done.data["top1"]["value"] < done.data["top1"]["high"]
    shown = here("evaluate", built.bundle, "--data", "digits")
    assert shown.exit_code == 0
    for word in ("top-1", "top-5", "calibration error", "95 % interval", "lowest classes"):
        assert word in shown.stdout


def test_a_configuration_is_a_name_for_the_student_that_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    request, _ = api.build_request(api.BuildOptions(student="quickstart", targets=("onnx-fp32",)), print)
    assert (request.config.student, request.config.recipe) == ("mobilenetv2", "digits")
    assert request.out == Path("dist/quickstart")
    named, _ = api.build_request(
        api.BuildOptions(config=Path("export_configs/quickstart.toml"), student="resnet18", targets=("onnx-fp32",)),
        print,
    )
    assert (named.config.student, named.out) == ("resnet18", Path("dist/resnet18"))


def test_quickstart_builds_the_shipped_configuration_and_says_what_it_leaves_out(
    here: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdexport.backends.base import Missing
    from kdexport.targets import Target

    asked: dict[str, object] = {}
    monkeypatch.setattr("kdexport.commands.quickstart.build", lambda **options: asked.update(options))
    lacking = Missing("the builder is not installed", "Install it")
    monkeypatch.setattr(Target, "unavailable", lambda self: None if self.backend == "onnx" else lacking)
    done = here("quickstart", cwd=tmp_path)
    assert done.exit_code == 0
    assert "without trt-rtx-fp16: the builder is not installed. Install it." in done.stderr
    assert (asked["target"], asked["out"]) == ("onnx-fp32", Path("dist/quickstart"))
    assert Path(str(asked["config"])).name == "quickstart.toml"
