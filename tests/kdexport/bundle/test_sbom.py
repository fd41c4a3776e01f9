"""The list of software beside the manifest: complete, the same bytes every time, and compared with the manifest."""

import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.model.bom import Bom

from kdexport import __version__
from kdexport.bundle.manifest import read_manifest
from kdexport.bundle.sbom import normalised, read_versions, serial_number, write_sbom
from kdexport.verify.consistency import check_consistency
from tests.conftest import Built

KEY = "ab" * 32


def written(folder: Path) -> dict[str, Any]:
    write_sbom(folder / "sbom.json", student="mobilenetv2", build_key=KEY)
    return dict(json.loads((folder / "sbom.json").read_text()))


def test_every_installed_distribution_is_listed_with_its_version_and_purl(tmp_path: Path) -> None:
    data = written(tmp_path)
    listed = {item["name"]: (item["version"], item["purl"]) for item in data["components"]}
    installed = {str(found.metadata["Name"]) for found in metadata.distributions()} - {"None"}
    assert {normalised(name) for name in listed} == {normalised(name) for name in installed} | {"python", "kdexport"}
    for name in ("torch", "numpy", "onnx"):
        assert listed[name] == (metadata.version(name), f"pkg:pypi/{name}@{metadata.version(name)}")
    assert listed["kdexport"][0] == __version__


def test_licences_are_expressions_or_names(tmp_path: Path) -> None:
    licences = {item["name"]: item.get("licenses") for item in written(tmp_path)["components"]}
    assert licences["python"] == [{"expression": "PSF-2.0"}]
    described = {name: metadata.metadata(name) for name in ("numpy", "packaging", "onnx")}
    for name, text in described.items():
        if "License-Expression" in text:
            assert licences[name] == [{"expression": text["License-Expression"]}]
    assert any("License-Expression" in text for text in described.values())
    assert all("\n" not in json.dumps(found) for found in licences.values())


def test_the_list_has_no_time_and_no_random_number_and_another_build_has_another_serial(tmp_path: Path) -> None:
    data = written(tmp_path)
    before = (tmp_path / "sbom.json").read_bytes()
    assert written(tmp_path) == data
    assert (tmp_path / "sbom.json").read_bytes() == before
    assert "timestamp" not in data["metadata"]
    assert data["serialNumber"] == serial_number(KEY).urn != serial_number(KEY[1:]).urn
    assert data["metadata"]["component"]["version"] == KEY


def test_another_program_reads_it_as_cyclonedx(tmp_path: Path) -> None:
    data = written(tmp_path)
    read = Bom.from_json(data)  # type: ignore[attr-defined]
    assert len(read.components) == len(data["components"])
    assert {dependency.ref.value for dependency in read.dependencies} >= {KEY}


def test_writing_takes_less_than_half_a_second_of_a_processor(tmp_path: Path) -> None:
    times = []
    # Another process on the same core slows each of them down at times.
    for _ in range(3):
        started = time.process_time()
        written(tmp_path)
        times.append(time.process_time() - started)
    assert min(times) < 0.5


def test_a_bundle_has_a_list_that_agrees_with_its_manifest(built: Built) -> None:
    manifest = read_manifest(built.bundle)
    assert "sbom.json" in manifest.files
    serial, versions = read_versions(built.bundle / "sbom.json")
    assert serial == serial_number(manifest.build_key).urn
    assert versions["torch"] == manifest.data["versions"]["torch"]
    checks = {check.subject: check.detail for check in check_consistency(built.bundle, manifest) if check.holds}
    assert checks["sbom.json"] == f"{len(versions)} packages, versions as in manifest.json"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"bomFormat": "SPDX"}', '{"bomFormat": "CycloneDX"}'])
def test_a_file_of_another_form_is_a_failed_check(content: str, bundle_copy: Path) -> None:
    (bundle_copy / "sbom.json").write_text(content)
    checks = check_consistency(bundle_copy, read_manifest(bundle_copy))
    assert [check.subject for check in checks if not check.holds] == ["sbom.json"]
