"""The Hugging Face Hub, through its own library. Tokens are those of ``hf auth login`` or HF_TOKEN."""

import os
import shutil
from pathlib import Path

#: What the library adds to a repository and to a folder; no file of a bundle.
_ADDED = (".gitattributes", ".cache")


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Make the repository ``name`` hold the files of ``folder`` and no others; the address of the revision."""
    from huggingface_hub import HfApi

    _be_quiet()
    api = HfApi(library_name="kdexport")
    # None: the default of the owner, which a new repository of an organisation may set to private.
    api.create_repo(name, exist_ok=True, private=True if private else None)
    commit = api.upload_folder(
        repo_id=name, folder_path=folder, commit_message="Upload a bundle with kdexport", delete_patterns="*"
    )
    return str(commit.commit_url)


def download(name: str, revision: str, folder: Path) -> None:
    """Fetch the files of a revision into ``folder``; the latest one if ``revision`` is empty."""
    from huggingface_hub import HfApi

    _be_quiet()
    HfApi(library_name="kdexport").snapshot_download(name, revision=revision or None, local_dir=folder)
    for added in _ADDED:
        path = folder / added
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _be_quiet() -> None:
    # Without statistics of use, and without bars between the lines of our own progress.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
