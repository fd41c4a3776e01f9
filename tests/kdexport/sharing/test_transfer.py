"""push and pull of a real bundle: dry runs without a network, and what is refused."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdexport.bundle.manifest import changed_files, hash_files, read_manifest
from kdexport.errors import BundleError, KdexportError, TransferError, VerificationError
from kdexport.sharing import hugging_face
from kdexport.sharing.places import parse_place
from kdexport.sharing.transfer import files_to_send, pull, push
from tests.conftest import Built, Command

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"


def quiet(_: str) -> None:
    pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for a repository, in place of what goes through the network."""
    place = tmp_path / "hub"

    def upload(folder: Path, name: str, *, private: bool) -> str:
        shutil.copytree(folder, place / name)
        return f"https://hub.example/{name}/commit/1"

    def download(name: str, revision: str, folder: Path) -> None:
        shutil.copytree(place / name, folder, dirs_exist_ok=True)

    monkeypatch.setattr(hugging_face, "upload", upload)
    monkeypatch.setattr(hugging_face, "download", download)
    return place


@pytest.mark.parametrize("place", ["hf://owner/digits", "oci://ghcr.io/owner/digits:1.0"])
def test_a_dry_run_lists_every_file_and_opens_no_connection(
    place: str, built: Built, here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    done = here("push", built.bundle, place, "--dry-run", "--json")
    assert done.exit_code == 0, done.stderr
    files = {file["name"]: file["sha256"] for file in done.data["files"]}
    assert {name: digest for name, digest in files.items() if name != "manifest.json"} == hash_files(built.bundle)
    assert {"manifest.json", "README.md", "golden/000.png"} <= set(files)
    total = sum(path.stat().st_size for path in built.bundle.rglob("*") if path.is_file())
    assert (done.data["bytes"], done.data["dry_run"], done.data["place"]) == (total, True, place)
    assert "url" not in done.data
    shown = here("push", built.bundle, place, "--dry-run")
    assert f"{total:,} bytes. Would be sent to {place}; nothing was sent." in shown.stdout


def test_a_changed_bundle_and_one_that_failed_are_not_sent(bundle_copy: Path, here: Command) -> None:
    with (bundle_copy / "README.md").open("a") as stream:
        stream.write("edited")
    done = here("push", bundle_copy, "hf://owner/digits", "--dry-run", "--json")
    assert (done.exit_code, done.error["code"]) == (1, "KDX330")
    assert "README.md changed" in done.error["message"]
    shutil.copyfile(bundle_copy / "report.md", bundle_copy / "README.md")
    data = json.loads((bundle_copy / "manifest.json").read_text())
    data["files"] = hash_files(bundle_copy)
    data["parity"][0]["holds"] = False
    (bundle_copy / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"1 of \d+ checks failed"):
        files_to_send(bundle_copy)


def test_a_bundle_returns_as_it_was(built: Built, hub: Path, here: Command, tmp_path: Path) -> None:
    done = here("push", built.bundle, "hf://owner/digits", "--json")
    assert done.data["url"] == "https://hub.example/owner/digits/commit/1"
    done = here("pull", "hf://owner/digits", "--out", tmp_path / "got", "--json")
    assert done.exit_code == 0, done.stderr
    assert (done.data["student"], done.data["bundle"]) == ("mobilenetv2", str(tmp_path / "got"))
    assert not changed_files(tmp_path / "got", read_manifest(built.bundle).files)
    # An older bundle is replaced, another folder is not.
    assert here("pull", "hf://owner/digits", "--out", tmp_path / "got").exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    done = here("pull", "hf://owner/digits", "--out", tmp_path / "mine", "--json")
    assert done.error["code"] == "KDX202"


def link(folder: Path) -> None:
    (folder / "report.md").unlink()
    (folder / "report.md").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"x"), VerificationError),
        (lambda folder: (folder / "golden" / "000.png").unlink(), VerificationError),
        (lambda folder: (folder / "other").touch(), VerificationError),
        (lambda folder: (folder / "manifest.json").unlink(), BundleError),
        (link, KdexportError),
    ],
    ids=["changed", "missing", "unknown", "no manifest", "link"],
)  # fmt: skip
def test_a_damaged_bundle_does_not_appear(
    damage: Callable[[Path], Any], error: type[KdexportError], bundle_copy: Path, hub: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle_copy, hub / "a" / "b")
    damage(hub / "a" / "b")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error):
        pull(parse_place("hf://a/b", pushes=False), tmp_path / "got", trusted=None, progress=quiet)
    assert sorted(tmp_path.iterdir()) == before


def test_no_token_is_printed(built: Built, here: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def refuse(*_: object, **__: object) -> str:
        try:
            raise OSError(f"{TOKEN} inside")
        except OSError as error:
            raise RuntimeError(f"401 Unauthorized: Bearer {TOKEN} https://me:{TOKEN}@hub/x") from error

    monkeypatch.setattr(hugging_face, "upload", refuse)
    monkeypatch.setattr(hugging_face, "download", refuse)
    for arguments in (("push", built.bundle, "hf://a/b"), ("pull", "hf://a/b", "--out", tmp_path / "got")):
        done = here(*arguments, "--json", "--debug")
        assert (done.exit_code, done.error["code"]) == (4, "KDX404")
        assert "401 Unauthorized" in done.error["message"]
        assert TOKEN not in done.stdout + done.stderr
    assert not (tmp_path / "got").exists()
    place = parse_place("hf://a/b", pushes=True)
    with pytest.raises(TransferError) as refused:
        push(built.bundle, place, files_to_send(built.bundle), private=False, progress=quiet)
    assert refused.value.__context__ is None
