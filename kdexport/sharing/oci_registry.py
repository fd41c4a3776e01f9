"""OCI registries, through oras: each file of a bundle is a layer with its path as title, as the oras command does."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdexport.core.files import scratch_folder
from kdexport.sharing.places import Place

_MEDIA_TYPE = "application/octet-stream"
_TITLE = "org.opencontainers.image.title"


def send(folder: Path, place: Place, names: Iterable[str]) -> str:
    """Upload the files ``names`` of ``folder``, then the manifest that names them; the address with its digest."""
    with scratch_folder("push") as scratch:
        # The library takes the titles of layers from the names of files alone, unless this file has others.
        paths = {name: str((folder / name).absolute()) for name in names}
        titles = scratch / "annotations.json"
        titles.write_text(json.dumps({path: {_TITLE: name} for name, path in paths.items()}))
        answer = _client(place).push(
            target=_target(place),
            files=[f"{path}:{_MEDIA_TYPE}" for path in paths.values()],
            disable_path_validation=True,
            annotation_file=str(titles),
            quiet=True,
        )
    digest = answer.headers.get("Docker-Content-Digest", "")
    return f"{place}{f'@{digest}' if digest else ''}"


def fetch(place: Place, folder: Path) -> None:
    """Download the layers of an image into ``folder``."""
    _client(place).pull(target=_target(place), outdir=str(folder))


def _target(place: Place) -> str:
    return str(place).removeprefix("oci://")


def _client(place: Place) -> Any:
    from oras.client import OrasClient
    from oras.logger import setup_logger

    setup_logger(quiet=True)
    # As Docker does, a registry on this machine is spoken to without TLS.
    is_here = place.host.partition(":")[0] in ("localhost", "127.0.0.1")
    return OrasClient(insecure=is_here)
