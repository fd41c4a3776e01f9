"""Files that were changed together with their digests contradict other fields of the manifest, and are named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdexport.bundle.manifest import hash_files, read_golden, read_manifest
from kdexport.verify import verdict
from kdexport.verify.consistency import check_consistency, check_recorded_errors
from kdexport.verify.policy import Policy, looser_than_default, parse_policy
from kdexport.verify.student_checks import check_integrity, student_checks
from kdexport.verify.verdict import Verdict, replay, target_runs
from tests.conftest import Built, Command

TASK, GOLDEN = "metrics/validation.safetensors", "golden/logits.safetensors"
ANSWERS = "metrics/answers.safetensors"
FP16 = "targets/trt-rtx-fp16/model.onnx"


def tampered(folder: Path, edit: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """Change the manifest, and write the digest of every file into it."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    data["files"] = hash_files(folder)
    path.write_text(json.dumps(data))


def tensors_changed(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def failed(folder: Path) -> dict[str, str]:
    """The failed checks: what each is about, and what it found."""
    manifest = read_manifest(folder)
    checks = [*check_integrity(folder, manifest), *check_consistency(folder, manifest)]
    return {f"{check.subject} {check.name}": check.detail for check in checks if check.failed}


def test_a_bundle_as_it_was_built_is_consistent(built: Built) -> None:
    manifest = read_manifest(built.bundle)
    facts = {check.subject: check.detail for check in check_consistency(built.bundle, manifest) if check.holds}
    images = manifest.data["task"]["images"]
    assert facts[TASK] == f"{images} images, figures as in manifest.json"
    assert facts[ANSWERS] == f"{images} images, predictions as in {TASK}"
    assert facts[GOLDEN] == f"9 of 9 images that are also in {TASK} have its label and prediction"
    assert {"unfused.safetensors", "model.onnx"} < facts.keys()


def test_a_plan_that_was_replaced_together_with_its_digest_is_found(bundle_copy: Path) -> None:
    plan = bundle_copy / "targets/trt-rtx-fp16/model.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"!")
    tampered(bundle_copy)
    check = "targets/trt-rtx-fp16/model.plan compiled from its ONNX file"
    assert "model.plan has sha256" in failed(bundle_copy)[check]
    # An ONNX file that the plan was not built from.
    shutil.copyfile(bundle_copy / "targets/onnx-fp32/model.onnx", bundle_copy / FP16)
    tampered(bundle_copy)
    assert "model.onnx has sha256" in failed(bundle_copy)[check]


def test_a_plan_of_an_earlier_version_is_not_bound_and_says_so(bundle_copy: Path) -> None:
    tampered(bundle_copy, lambda data: data["targets"]["trt-rtx-fp16"].pop("compiled"))
    manifest = read_manifest(bundle_copy)
    facts = {check.name: check.detail for check in check_consistency(bundle_copy, manifest) if not check.ran}
    assert facts["compiled from its ONNX file"] == "not bound: the bundle is of an earlier version"
    assert "trt-rtx-fp16 never ran (built, not executed, not bound to its ONNX file)" in [
        str(run) for run in target_runs(manifest, Verdict(()))
    ]


def test_another_checkpoint_than_the_recorded_one_is_found(bundle_copy: Path) -> None:
    tensors_changed(bundle_copy / "unfused.safetensors", lambda t: t["conv1.0.weight"].mul_(1 + 1e-6))
    tampered(bundle_copy)
    assert list(failed(bundle_copy)) == ["unfused.safetensors origin"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda data: data["versions"].update(torch="1.0"), ", 1.0 in manifest.json"),
        (lambda data: data["versions"].update(python="3.0.0"), "python 3."),
        (lambda data: data["versions"].update(unheard_of="1"), "unheard_of absent, 1 in manifest.json"),
        (lambda data: data.update(kdexport="99"), "kdexport 0."),
        (lambda data: data.update(build_key="0" * 64), "the serial number is urn:uuid:"),
    ],
)
def test_versions_and_a_build_that_the_list_of_software_contradicts_are_found(
    edit: Callable[[dict[str, Any]], object], words: str, bundle_copy: Path
) -> None:
    tampered(bundle_copy, edit)
    found = failed(bundle_copy)
    assert list(found) == ["sbom.json software"]
    assert words in found["sbom.json software"]


def test_a_bundle_of_an_earlier_version_has_no_list_of_software(bundle_copy: Path) -> None:
    (bundle_copy / "sbom.json").unlink()
    assert list(failed(bundle_copy)) == ["bundle sha256", "sbom.json readable"]
    tampered(bundle_copy)
    assert failed(bundle_copy) == {}


def test_other_operators_than_the_recorded_ones_are_counted(bundle_copy: Path) -> None:
    tampered(bundle_copy, lambda data: data["operators"]["fused"].update(Conv=3))
    model = onnx.load(bundle_copy / "model.onnx")
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    assert failed(bundle_copy) == {"model.onnx operators": f"{convolutions} Conv, 3 in manifest.json"}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda task: task.update(reference_top1=0.999), "reference_top1 is "),
        (lambda task: task.update(images=7), "and 7 in manifest.json"),
        (lambda task: task["files"][FP16].update(top1=1.0), f"top1 of {FP16} is "),
        (lambda task: task["files"][FP16].update(flips=99), f"flips of {FP16} is "),
        (lambda task: task["files"][FP16].update(mean_divergence=1e-9), f"mean_divergence of {FP16} is "),
        (lambda task: task["files"][FP16].update(precision="int8"), f"{FP16} has the precision int8"),
        (lambda task: task["files"].pop(FP16), f"manifest.json has no figures of {FP16}"),
    ],
)
def test_figures_that_are_not_those_of_the_stored_results_are_found(
    edit: Callable[[dict[str, Any]], object], words: str, bundle_copy: Path
) -> None:
    tampered(bundle_copy, lambda data: edit(data["task"]))
    found = failed(bundle_copy)
    assert list(found) == [f"{TASK} task"]
    assert words in found[f"{TASK} task"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t["predictions"].fill_(10), "predictions has a class that does not exist"),
        (lambda t: t[f"{FP16}:predictions"].fill_(-1), f"{FP16}:predictions has a class that does not exist"),
        (lambda t: t["indices"].fill_(4), "an image is in the results twice"),
        (lambda t: t.update(added=torch.ones(3)), "added is unknown"),
        (lambda t: t.update({f"{FP16}:added": torch.ones(3)}), f"{FP16}:added is unknown"),
        (lambda t: t.update(labels=t["labels"].float()), "labels has the type torch.float32"),
        (lambda t: t.update(margins=t["margins"].int()), "margins has the type torch.int32"),
        (lambda t: t.update({f"{FP16}:errors": torch.zeros(3)}), f"{FP16}:errors has shape (3,)"),
        (lambda t: t[f"{FP16}:predictions"].copy_(1 - t[f"{FP16}:predictions"].clamp(max=1)), f"flips of {FP16} is "),
    ],
)
def test_stored_results_that_were_changed_are_found(
    edit: Callable[[dict[str, Tensor]], object], words: str, bundle_copy: Path
) -> None:
    tensors_changed(bundle_copy / TASK, edit)
    tampered(bundle_copy)
    assert words in failed(bundle_copy)[f"{TASK} task"]


def test_a_removed_task_is_found_where_its_results_exist(bundle_copy: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["task"] = None
        del data["answers"]
        for check in data["parity"]:
            check["undecided"] = False

    tampered(bundle_copy, edit)
    assert failed(bundle_copy) == {
        f"{TASK} task": "the file exists, and manifest.json has no task",
        f"{ANSWERS} answers": "the file exists, and manifest.json has none",
    }
    (bundle_copy / ANSWERS).unlink()
    (bundle_copy / TASK).unlink()
    (bundle_copy / TASK).parent.rmdir()
    tampered(bundle_copy)
    assert failed(bundle_copy) == {}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t[f"{FP16}:classes"].copy_(t[f"{FP16}:classes"].flip(1)), f"of {FP16} are not its predictions"),
        (lambda t: t["unfused:classes"].copy_(t["unfused:classes"].flip(1)), "of unfused are not its predictions"),
        (lambda t: t["unfused:ranks"].copy_(9 - t["unfused:ranks"]), "the ranks of unfused are not those"),
        (lambda t: t[f"{FP16}:ranks"].fill_(10), f"{FP16}:ranks has a value outside of 0 to 9"),
        (lambda t: t[f"{FP16}:classes"].fill_(-1), f"{FP16}:classes has a value outside of 0 to 9"),
        (lambda t: t.update({"unfused:logits": t["unfused:logits"][:3]}), "unfused:logits is (3, 5) float32"),
        (lambda t: t.update({"unfused:logits": t["unfused:logits"].double()}), "float64, expected"),
        (lambda t: t.pop(f"{FP16}:log_sum_exp"), f"{FP16}:log_sum_exp"),
    ],
)
def test_stored_answers_that_were_changed_are_found(
    edit: Callable[[dict[str, Tensor]], object], words: str, bundle_copy: Path
) -> None:
    tensors_changed(bundle_copy / ANSWERS, edit)
    tampered(bundle_copy)
    found = failed(bundle_copy)
    (told,) = found.values()
    assert words in told


def test_answers_of_a_later_form_are_not_read(bundle_copy: Path) -> None:
    tampered(bundle_copy, lambda data: data["answers"].update(version=2))
    (told,) = failed(bundle_copy).values()
    assert "has the version 2; this version of kdexport reads 1" in told


def test_a_bundle_of_an_earlier_version_has_no_answers(bundle_copy: Path) -> None:
    (bundle_copy / ANSWERS).unlink()
    tampered(bundle_copy, lambda data: data.pop("answers"))
    assert failed(bundle_copy) == {}


def test_a_graph_without_results_is_found(bundle_copy: Path) -> None:
    def remove(tensors: dict[str, Tensor]) -> None:
        for name in ("predictions", "divergences", "errors"):
            del tensors[f"{FP16}:{name}"]

    tensors_changed(bundle_copy / TASK, remove)
    tampered(bundle_copy, lambda data: data["task"]["files"].pop(FP16))
    assert failed(bundle_copy) == {f"{TASK} task": f"there are no results of {FP16}"}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t["labels"].fill_(10), "expected 9 labels from 0 to 9, found [10, "),
        (lambda t: t["labels"].__setitem__(3, (t["labels"][3] + 1) % 10), "8 of 9 images"),
        (lambda t: t.update(labels=t["labels"][:4].clone()), "expected 9 labels"),
        (lambda t: t.update(logits=t["logits"].roll(1, 1)), "0 of 9 images"),
    ],
)
def test_golden_labels_and_logits_agree_with_the_task(
    edit: Callable[[dict[str, Tensor]], object], words: str, bundle_copy: Path
) -> None:
    tensors_changed(bundle_copy / GOLDEN, edit)
    tampered(bundle_copy)
    found = failed(bundle_copy)
    assert list(found) == [f"{GOLDEN} labels"]
    assert words in found[f"{GOLDEN} labels"]


def test_a_prediction_of_the_task_that_the_golden_logits_contradict_is_found(bundle_copy: Path) -> None:
    manifest = read_manifest(bundle_copy)
    logits = load_file(bundle_copy / GOLDEN)["logits"].numpy()

    def edit(tensors: dict[str, Tensor]) -> None:
        place = int(np.flatnonzero(tensors["indices"].numpy() == 0)[0])
        tensors["predictions"][place] = int(logits[0].argmin())

    tensors_changed(bundle_copy / TASK, edit)
    tampered(bundle_copy)
    assert failed(bundle_copy)[f"{GOLDEN} labels"].endswith(f"; {manifest.golden[0]} differs")


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (lambda task: task["files"][FP16].update(unit_error=1.0), FP16),
        (lambda task: task.update(own_error=float("inf")), "manifest.json"),
        (lambda task: task["files"]["model.onnx"].update(unit_error=float("nan")), "model.onnx"),
    ],
)
def test_a_recorded_error_that_would_loosen_rung_d_is_found(
    edit: Callable[[dict[str, Any]], object], name: str, bundle_copy: Path
) -> None:
    def recorded(folder: Path) -> dict[str, bool]:
        manifest = read_manifest(folder)
        _, context = student_checks(folder, manifest, read_golden(folder, manifest))
        assert context is not None
        return {check.subject: check.holds for check in check_recorded_errors(context)}

    assert recorded(bundle_copy) == {"manifest.json": True, "model.onnx": True, FP16: True}
    tampered(bundle_copy, lambda data: edit(data["task"]))
    assert [subject for subject, holds in recorded(bundle_copy).items() if not holds] == [name]


@pytest.mark.parametrize("file", ["unfused.safetensors", "model.onnx", TASK, GOLDEN])
def test_a_file_that_cannot_be_read_is_a_failed_check(file: str, bundle_copy: Path) -> None:
    (bundle_copy / file).write_bytes(b"no such format")
    tampered(bundle_copy)
    assert any(name.startswith(file) for name in failed(bundle_copy))


def link(folder: Path) -> str:
    name = "golden/000.png"
    (folder / name).rename(folder.parent / "elsewhere.png")
    (folder / name).symlink_to(folder.parent / "elsewhere.png")
    return f"{name} is a symbolic link"


def hard_link(folder: Path) -> str:
    os.link(folder / "report.md", folder.parent / "other.md")
    return "report.md is a hard link"


def pipe(folder: Path) -> str:
    (folder / "golden" / "000.png").unlink()
    os.mkfifo(folder / "golden" / "000.png")
    return "golden/000.png is a device, pipe or socket"


def empty_folder(folder: Path) -> str:
    (folder / "golden" / "later").mkdir()
    return "golden/later is an empty folder"


@pytest.mark.parametrize("make", [link, hard_link, pipe, empty_folder])
def test_what_is_no_regular_file_is_named_and_a_link_is_not_followed(
    make: Callable[[Path], str], bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = make(bundle_copy)
    tampered(bundle_copy)
    monkeypatch.setattr(verdict, "verify_folder", lambda *_, **__: Verdict(()))
    monkeypatch.setattr(verdict, "check_golden", lambda *_: [])
    checks = replay(bundle_copy, read_manifest(bundle_copy), lambda _: None).checks
    facts = {check.name: check.detail for check in checks if not check.holds}
    assert facts["regular files"] == words
    assert ("origin" in {check.name for check in checks}) == (make is empty_folder)


def test_looser_limits_than_the_default_ones_are_listed() -> None:
    policy = parse_policy({"C": {"headroom": 4.0, "rms_error": 1.0}, "D": {"int8": {"flips": 0.2}}}, "test")
    assert [str(change) for change in looser_than_default(policy)] == [
        "C.headroom is 4 instead of 8", "D.int8.flips is 0.2 instead of 0.1",
    ]  # fmt: skip
    assert looser_than_default(Policy()) == ()


def test_verify_says_which_limit_of_the_bundle_is_looser(
    bundle_copy: Path, here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "verify_folder", lambda *_, **__: Verdict(()))
    tampered(bundle_copy, lambda data: data["policy"]["D"]["fp16"].update(flips=0.5))
    done = here("verify", bundle_copy)
    assert done.exit_code == 0, done.stderr
    assert "The policy of the bundle is looser than the default: D.fp16.flips is 0.5 instead of 0.005.\n" in done.stdout
    verdict_line = done.stdout.splitlines()[-1]
    assert verdict_line.startswith("Verdict: all ")
    assert verdict_line.endswith(
        f"; limits looser than the default: D.fp16.flips: {bundle_copy} is the trained student."
    )
    listed = here("verify", bundle_copy, "--json").data["policy_looser"]
    assert listed == [{"key": "D.fp16.flips", "default": 0.005, "bundle": 0.5}]
