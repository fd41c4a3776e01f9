"""The model card: its front matter as the Hub reads it, and its Python as a user runs it."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from kdexport.bundle.manifest import read_manifest, require_unchanged
from kdexport.data.preprocessing import Preprocessing, read_image
from kdexport.report.contents import stored_evidence
from kdexport.report.model_card import CardFacts, model_card, snippet
from tests.conftest import Built

huggingface_hub = pytest.importorskip("huggingface_hub")


def card(built: Built, facts: CardFacts = CardFacts(), **changes: Any) -> str:  # noqa: B008
    manifest = read_manifest(built.bundle)
    return model_card({**manifest.data, **changes}, stored_evidence(built.bundle, manifest), facts)


def test_a_bundle_has_a_card_that_its_digests_cover(built: Built, bundle_copy: Path) -> None:
    manifest = read_manifest(built.bundle)
    assert "README.md" in manifest.files
    assert (built.bundle / "README.md").read_text() == card(built)
    (bundle_copy / "README.md").write_text("another")
    with pytest.raises(Exception, match=r"README\.md changed"):
        require_unchanged(bundle_copy, manifest)


def test_the_front_matter_is_read_by_the_hub_and_says_only_what_was_given_or_measured(built: Built) -> None:
    plain = huggingface_hub.ModelCard(card(built)).data.to_dict()
    assert (plain["pipeline_tag"], plain["library_name"]) == ("image-classification", "kdexport")
    assert "license" not in plain
    assert "datasets" not in plain
    (index,) = plain["model-index"]
    metrics = {metric["name"]: metric["value"] for result in index["results"] for metric in result["metrics"]}
    task = read_manifest(built.bundle).data["task"]
    # The file of the other target is an engine, which did not run here.
    assert metrics == {"top-1, onnx-fp32": round(task["files"]["model.onnx"]["top1"], 6)}
    facts = CardFacts(license="apache-2.0", datasets=("owner/set",), tags=("a: b", "- [x]"))
    given = huggingface_hub.ModelCard(card(built, facts)).data.to_dict()
    assert (given["license"], given["datasets"]) == ("apache-2.0", ["owner/set"])
    assert given["tags"][-2:] == ["a: b", "- [x]"]


def test_names_cannot_end_the_front_matter_or_a_table_and_paths_of_the_builder_are_left_out(built: Built) -> None:
    data = read_manifest(built.bundle).data
    hostile = "net\n---\n# x | <script> &"
    student = {**data["student"], "student": hostile, "classes": ["a|b\n", "<b>", *map(str, range(98))]}
    recipe = {"data": {"name": "folder:/home/ann/photos"}}
    text = card(built, student=student, provenance={**data["provenance"], "recipe": recipe})
    found = huggingface_hub.ModelCard(text).data.to_dict()
    assert found["model-index"][0]["name"] == hostile
    body = text[text.index("\n---\n\n#") :]
    assert "<script>" not in body
    assert "# net --- # x / &lt;script&gt; &amp;\n" in body
    assert "and 80 more in manifest.json" in body
    assert "/home" not in text
    assert "own images" in text


def test_the_card_says_what_is_not_known(built: Built) -> None:
    text = card(built)
    assert "Built, but not run at build time: trt-rtx-fp16." in text
    assert "| trt-rtx-fp16 |" in text
    assert re.search(r"\n\| onnx-fp32 \| [\d.]+ MB \| [\d.]+ ms .*\| verified \(onnxruntime", text)
    assert re.search(r"\n\| trt-rtx-fp16 \| [\d.]+ MB \| not timed \(.*\) \|.*\| built, not executed \|", text)
    assert "Top-1 of the unfused student" not in card(built, task=None, parity=[])
    assert "model-index" not in card(built, task=None, parity=[])


def test_the_python_of_the_card_gives_the_reference_answers(built: Built, tmp_path: Path) -> None:
    """In a process of its own, as a user without kdexport would run it, on each golden image."""
    for name in ("manifest.json", "model.onnx"):
        shutil.copyfile(built.bundle / name, tmp_path / name)
    (code,) = re.findall(r"```python\n(.*?)```", card(built), flags=re.DOTALL)
    assert "kdexport" not in code
    lines = code.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("images = "))
    names = [str(built.bundle / name) for name in read_manifest(built.bundle).golden]
    looped = [*lines[:start], f"for name in {names!r}:"]
    looped += [f"    {line.replace(repr('photo.jpg').replace(chr(39), chr(34)), 'name')}" for line in lines[start:]]
    looped += ["    found = globals().setdefault('found', []); found.append(logits[0].tolist())", "print(found)"]
    (tmp_path / "try.py").write_text("\n".join(looped))
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "try.py"], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    *labels, logits = done.stdout.splitlines()
    reference = load_file(built.bundle / "golden" / "logits.safetensors")["logits"]
    classes = json.loads((tmp_path / "manifest.json").read_text())["student"]["classes"]
    assert np.abs(np.asarray(json.loads(logits)) - reference).max() < 1e-4 * np.abs(reference).max()
    assert labels == [classes[index] for index in reference.argmax(axis=1)]


BASE = Preprocessing.for_new_student(image_size=24, resize=30, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))


@pytest.mark.parametrize(
    "how",
    [
        BASE,
        replace(BASE, orientation="ignore", background=None, interpolation="bicubic"),
        replace(BASE, fit="squash", resize=24),
        replace(BASE, fit="pad", resize=24, pad_colour=(9, 200, 31)),
        replace(BASE, fit="pad", resize=37),
        replace(BASE, resize=19),
        replace(BASE, geometry="one_step", orientation="ignore", background=None),
        replace(BASE, background=(255, 255, 255), interpolation="lanczos"),
    ],
    ids=["crop", "ignore", "squash", "pad", "pad larger", "crop smaller", "one step", "white"],
)
@pytest.mark.parametrize("size", [(61, 37), (37, 62), (24, 24), (7, 90)])
def test_the_pixels_of_the_card_are_those_of_the_student(
    how: Preprocessing, size: tuple[int, int], tmp_path: Path
) -> None:
    values = np.random.default_rng(5).integers(0, 256, (size[1], size[0], 4), np.uint8)
    code = snippet(how)
    pixels: dict[str, Any] = {}
    # Without what reads the manifest.
    kept = [line for line in code[: code.index("session = ")].splitlines() if "student" not in line]
    exec("\n".join(kept), pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in ("RGB", "RGBA", "L"):
        path = tmp_path / f"{mode}.png"
        Image.fromarray(values).convert(mode).save(path, exif=exif)
        difference = np.abs(pixels["pixels"](path).astype(int) - how.pixels(read_image(path)).astype(int))
        # Pillow rounds a composition before it is resized.
        assert difference.max() <= (2 if mode == "RGBA" and how.background is not None else 0), mode
