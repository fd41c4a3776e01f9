import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from kdexport.bundle.manifest import hash_files
from kdexport.bundle.slim_form import write_slim
from kdexport.errors import BundleError, VerificationError
from kdexport.report.bundle_diff import diff_bundles, diff_tables
from kdexport.report.page import diff_html
from kdexport.stats.paired import estimate_drop
from kdexport.verify.policy import Change
from tests.conftest import Built, Command
from tests.kdexport.report.manifests import HOSTILE

TASK = "metrics/validation.safetensors"
FP16 = "targets/trt-rtx-fp16/model.onnx"


def rewritten(folder: Path, edit: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    """The bundle with another manifest and the digests of its files."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    data["files"] = hash_files(folder)
    path.write_text(json.dumps(data))
    return folder


def cells(folder_a: Path, folder_b: Path) -> dict[str, dict[str, tuple[str, ...]]]:
    return {
        table.title: {row[0]: row[1:] for row in table.rows} for table in diff_tables(diff_bundles(folder_a, folder_b))
    }


def test_a_bundle_is_the_same_as_itself(built: Built, here: Command) -> None:
    found = diff_bundles(built.bundle, built.bundle)
    assert found.same
    assert found.same_images
    assert [table.title for table in diff_tables(found)] == ["Bundles", "Targets", "The same images in both"]
    assert {pair.paired.flips for pair in found.targets if pair.paired} == {0}
    done = here("diff", built.bundle, built.bundle)
    assert done.exit_code == 0
    assert "Every file is the same." in done.stdout


def test_answers_to_the_same_images_are_paired(built: Built, bundle_copy: Path, here: Command) -> None:
    stored = load_file(bundle_copy / TASK)
    labels, before = stored["labels"], stored["model.onnx:predictions"].copy()
    after = before.copy()
    after[:7] = (labels[:7] + 1) % 10
    after[-3:] = labels[-3:]
    stored["model.onnx:predictions"] = after
    (bundle_copy / TASK).write_bytes(save(stored))
    found = diff_bundles(built.bundle, rewritten(bundle_copy))
    paired = {pair.name: pair.paired for pair in found.targets}
    lost = sum(1 for old, new, label in zip(before, after, labels, strict=True) if old == label != new)
    gained = sum(1 for old, new, label in zip(before, after, labels, strict=True) if new == label != old)
    one = paired["onnx-fp32"]
    assert one is not None
    assert (one.images, one.flips, one.lost, one.gained) == (len(labels), int((before != after).sum()), lost, gained)
    assert one.drop == estimate_drop(lost, gained, len(labels))
    other = paired["trt-rtx-fp16"]
    assert other is not None
    assert other.flips == 0
    assert found.files == {TASK: "changed"}
    result = here("diff", built.bundle, bundle_copy, "--json").data
    assert result["files"] == {TASK: "changed"}
    assert result["targets"][0]["paired"]["lost"] == lost


def test_other_images_are_not_paired(built: Built, bundle_copy: Path) -> None:
    found = diff_bundles(built.bundle, rewritten(bundle_copy, lambda data: data["task"].update(data_sha256="0" * 64)))
    assert not found.same_images
    assert all(pair.paired is None for pair in found.targets)


def test_each_change_of_the_manifest_is_named(built: Built, bundle_copy: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["student"]["preprocessing"]["mean"] = [0.25, 0.5, 0.75]
        data["student"]["classes"] = [*data["student"]["classes"][:-1], "ten"]
        data["policy"]["D"]["fp32"]["flips"] = 0.25
        data["versions"]["numpy"] = "9.9"
        data["versions"].pop("torch")
        data["provenance"]["seed"] = 77
        data["provenance"]["metrics"] |= {"top1": 0.5, "images_per_s": 1.0}
        del data["targets"]["trt-rtx-fp16"]

    (bundle_copy / "golden/000.png").unlink()
    (bundle_copy / "model.onnx").write_bytes(b"other")
    found = cells(built.bundle, rewritten(bundle_copy, edit))
    changed = found["Changed"]
    assert changed["classes"] == ("only in A: 9", "only in B: ten")
    assert changed["preprocessing: mean"][1] == "(0.25, 0.5, 0.75)"
    assert changed["policy: D.fp32.flips"] == ("0.001", "0.25 (looser)")
    assert changed["version: numpy"][1] == "9.9"
    assert changed["version: torch"][1] == "absent"
    assert changed["origin: seed"][1] == "77"
    assert changed["origin: metrics.top1"][1] == "0.5"
    assert not [name for name in changed if "images_per_s" in name]
    assert found["Files"] == {"model.onnx": ("changed",), "golden: 1 images": ("only in A",)}
    assert found["Targets"]["trt-rtx-fp16"][0].endswith(" -> absent")
    assert "validation images" in changed


def test_the_same_classes_in_another_order_are_named(built: Built, bundle_copy: Path) -> None:
    rewritten(bundle_copy, lambda data: data["student"]["classes"].reverse())
    assert cells(built.bundle, bundle_copy)["Changed"]["classes"] == ("the same", "in another order")


def test_a_bundle_of_an_earlier_version_has_the_latency_of_its_comparison(built: Built, bundle_copy: Path) -> None:
    data = json.loads((built.bundle / "manifest.json").read_text())
    rewritten(bundle_copy, lambda data: data.pop("target_times"))
    assert cells(bundle_copy, built.bundle)["Targets"]["onnx-fp32"][1] == f"{data['latency']['candidate_ms']:.3f} ms"


def test_a_slim_bundle_is_compared_by_what_it_has(built: Built, tmp_path: Path) -> None:
    write_slim(built.bundle, tmp_path / "slim")
    found = diff_bundles(built.bundle, tmp_path / "slim")
    assert found.same_images
    assert {pair.paired.flips for pair in found.targets if pair.paired} == {0}
    assert set(found.files.values()) == {"only in A"}


def test_a_damaged_bundle_exits_with_1_and_another_folder_with_2(
    built: Built, bundle_copy: Path, tmp_path: Path, here: Command
) -> None:
    (bundle_copy / "report.md").write_text("")
    with pytest.raises(VerificationError):
        diff_bundles(built.bundle, bundle_copy)
    with pytest.raises(BundleError):
        diff_bundles(tmp_path, built.bundle)
    assert here("diff", built.bundle, bundle_copy).exit_code == 1
    page = tmp_path / "diff.html"
    done = here("diff", tmp_path, built.bundle, "--html", page, "--json")
    assert (done.exit_code, done.error["code"]) == (2, "KDX203")
    assert not page.exists()


def test_the_page_shows_names_as_text(built: Built, tmp_path: Path, here: Command) -> None:
    found = diff_bundles(built.bundle, built.bundle)
    hostile = replace(
        found,
        a=replace(found.a, student=HOSTILE, folder=HOSTILE, passes=False),
        classes_added=(HOSTILE,) * 9,
        policy=(Change(key=HOSTILE, old=1, new=HOSTILE, loosens=False),),
        origin={HOSTILE: (None, [HOSTILE])},
        files={HOSTILE: "changed"},
    )
    source = diff_html(hostile)
    assert "<script" not in source
    assert "<b>" not in source
    assert "A did not pass at the build" in source
    assert "and 1 more" in source
    page = tmp_path / "diff.html"
    assert here("diff", built.bundle, built.bundle, "--html", page).exit_code == 0
    assert page.read_text() == diff_html(found)
    assert np.all([word in page.read_text() for word in ("onnx-fp32 A", "onnx-fp32 B", "<svg")])
