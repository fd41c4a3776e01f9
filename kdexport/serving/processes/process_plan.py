"""What every process of a server is told, and how many processes there are."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdexport.backends.ort import CPU
from kdexport.serving.limits import Limits, usable_processors
from kdexport.serving.server import Surroundings
from kdexport.serving.service import Settings, read_token

#: Where connections to one port are dealt out to all sockets that listen on it; elsewhere the last socket gets all.
_SHARES_PORTS = sys.platform == "linux"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The bundles, settings, surroundings and certificate of a server, and the memory of its supervisor in bytes."""

    bundles: tuple[str, ...]
    settings: Settings
    surroundings: Surroundings
    tls_cert: Path | None = None
    tls_key: Path | None = None
    supervisor_bytes: int = 0

    def to_text(self) -> str:
        """For the command line of a process, which others can read: without the token, which it reads from its file."""
        settings = {**asdict(self.settings), "token": None}
        return json.dumps({**asdict(self), "settings": settings}, default=str)

    @classmethod
    def from_text(cls, text: str) -> "Plan":
        """What ``to_text`` wrote, with the token of its file; raises ``ServerError`` if that cannot be read."""
        data: dict[str, Any] = json.loads(text)
        settings, surroundings = data.pop("settings"), data.pop("surroundings")
        paths = {key: _path(data.pop(key)) for key in ("tls_cert", "tls_key")}
        settings |= {key: _path(settings[key]) for key in ("token_file", "trusted")}
        settings |= {"limits": Limits(**settings["limits"]), "token": read_token(settings["token_file"])}
        surroundings["origins"] = tuple(surroundings["origins"])
        return cls(
            bundles=tuple(data.pop("bundles")), settings=Settings(**settings),
            surroundings=Surroundings(**surroundings), tls_cert=paths["tls_cert"], tls_key=paths["tls_key"], **data,
        )  # fmt: skip


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)


def processes_for(instances: int, provider: str) -> int:
    """The number of processes for this many runs of a model at the same time; 0 runs leave the choice to the server.

    Several processes on a CPU, at most one for each processor; one on a GPU, and where processes cannot share a port.
    """
    if provider != CPU or not _SHARES_PORTS:
        return 1
    return max(1, min(instances, usable_processors()))
