"""push and pull through a registry that runs in this process."""

import json
from pathlib import Path

import pytest

from kdexport.bundle.manifest import changed_files, read_manifest
from tests.conftest import Built, Command
from tests.kdexport.sharing.small_registry import running_registry

pytest.importorskip("oras", reason="oras is of the extra hub")


def test_a_bundle_goes_through_a_registry_and_returns_as_it_was(built: Built, here: Command, tmp_path: Path) -> None:
    with running_registry() as registry:
        place = f"oci://{registry.host}/me/digits:1.0"
        done = here("push", built.bundle, place, "--json")
        assert done.exit_code == 0, done.stderr
        assert done.data["url"].startswith(f"{place}@sha256:")
        layers = json.loads(registry.manifests["1.0"])["layers"]
        titles = {layer["annotations"]["org.opencontainers.image.title"]: layer["digest"] for layer in layers}
        assert set(titles) == {file["name"] for file in done.data["files"]}
        assert "golden/000.png" in titles
        # What is there is not sent again.
        sent = len([line for line in registry.requests if line.startswith("PUT")])
        assert here("push", built.bundle, place).exit_code == 0
        assert len([line for line in registry.requests if line.startswith("PUT")]) == sent + 1
        assert here("pull", place, "--out", tmp_path / "got").exit_code == 0
        assert not changed_files(tmp_path / "got", read_manifest(built.bundle).files)

        # A registry that gives other bytes.
        (digest,) = {
            layer["digest"] for layer in layers if layer["annotations"]["org.opencontainers.image.title"] == "report.md"
        }
        registry.blobs[digest] = b"another report"
        done = here("pull", place, "--out", tmp_path / "other", "--json")
        assert (done.exit_code, done.error["code"]) == (1, "KDX330")
        assert "report.md changed" in done.error["message"]
        done = here("pull", f"oci://{registry.host}/me/digits:2.0", "--out", tmp_path / "other", "--json")
        assert (done.exit_code, done.error["code"]) == (4, "KDX404")
        assert [path.name for path in tmp_path.iterdir()] == ["got"]


def test_a_title_outside_of_the_folder_is_refused(here: Command, tmp_path: Path) -> None:
    with running_registry() as registry:
        empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        registry.blobs[empty] = b""
        layer = {"mediaType": "application/octet-stream", "digest": empty, "size": 0}
        outside = {**layer, "annotations": {"org.opencontainers.image.title": "../../../outside"}}
        registry.manifests["1"] = json.dumps({"schemaVersion": 2, "config": layer, "layers": [outside]}).encode()
        done = here("pull", f"oci://{registry.host}/x:1", "--out", tmp_path / "got", "--json")
    assert (done.exit_code, done.error["code"]) == (4, "KDX404")
    assert list(tmp_path.iterdir()) == []
