"""What is asked of the Hub's library, without a network."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdexport.sharing.hugging_face import download, upload

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The calls of an ``HfApi`` that keeps the real signatures and reaches nothing."""
    import inspect

    calls: list[tuple[str, dict[str, Any]]] = []
    real = huggingface_hub.HfApi

    class Api:
        def __init__(self, **options: Any) -> None:
            inspect.signature(real).bind(**options)

        def _note(self, name: str, *arguments: Any, **options: Any) -> Any:
            bound = inspect.signature(getattr(real, name)).bind(self, *arguments, **options)
            calls.append((name, {key: value for key, value in bound.arguments.items() if key != "self"}))
            return SimpleNamespace(commit_url="https://huggingface.co/a/b/commit/1")

        def create_repo(self, *arguments: Any, **options: Any) -> Any:
            return self._note("create_repo", *arguments, **options)

        def upload_folder(self, *arguments: Any, **options: Any) -> Any:
            return self._note("upload_folder", *arguments, **options)

        def snapshot_download(self, *arguments: Any, **options: Any) -> Any:
            folder = Path(options["local_dir"])
            (folder / ".cache" / "huggingface").mkdir(parents=True)
            (folder / ".gitattributes").touch()
            (folder / "manifest.json").touch()
            return self._note("snapshot_download", *arguments, **options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


def test_a_push_makes_the_repository_and_leaves_only_the_files_of_the_bundle_in_it(
    asked: list[tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    assert upload(tmp_path, "a/b", private=True) == "https://huggingface.co/a/b/commit/1"
    (created, sent) = asked
    assert created == ("create_repo", {"repo_id": "a/b", "exist_ok": True, "private": True})
    assert (sent[0], sent[1]["repo_id"], sent[1]["delete_patterns"]) == ("upload_folder", "a/b", "*")
    assert sent[1]["folder_path"] == tmp_path
    asked.clear()
    upload(tmp_path, "a/b", private=False)
    assert asked[0][1]["private"] is None


def test_a_pull_leaves_the_files_of_the_repository_alone(
    asked: list[tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    download("a/b", "v1", tmp_path)
    assert asked == [("snapshot_download", {"repo_id": "a/b", "revision": "v1", "local_dir": tmp_path})]
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
