"""The clock ``serve``: the real HTTP server in a process of its own, asked over loopback on a kept connection.

A server runs one target; arms of two targets have a server each.
"""

import contextlib
import http.client
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdexport.core.child import ChildDiedError, ChildTimeoutError, started
from kdexport.errors import VerificationError
from kdexport.timing.measure import Run

_START_S, _ANSWER_S = 120.0, 60.0


@dataclass(frozen=True, slots=True)
class Client:
    """One kept connection to the server of each model."""

    connections: dict[str, http.client.HTTPConnection]

    def request(self, model: str, images: NDArray[np.float32]) -> Run:
        """A callable that sends (n,3,S,S) float32 as a raw binary request and reads the whole answer."""
        connection, body, path = self.connections[model], images.tobytes(), f"/v2/models/{model}/infer"
        headers = {"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"}

        def ask() -> None:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise VerificationError(
                    f"The server answered {answer.status}: {content[:200].decode(errors='replace')}",
                    remedy="Use a batch size that the bundle was exported for.",
                )

        return ask


@contextlib.contextmanager
def serving(arms: dict[str, tuple[str, str]]) -> Iterator[Client]:
    """Serve arms, (bundle folder, target) by name, one instance each; the servers end with the block."""
    with contextlib.ExitStack() as stack:
        connections: dict[str, http.client.HTTPConnection] = {}
        for target in dict.fromkeys(target for _, target in arms.values()):
            folders = {name: folder for name, (folder, wanted) in arms.items() if wanted == target}
            connections |= dict.fromkeys(folders, stack.enter_context(_server(folders, target)))
        yield Client(connections)


@contextlib.contextmanager
def _server(folders: dict[str, str], target: str) -> Iterator[http.client.HTTPConnection]:
    models = [f"{name}={folder}" for name, folder in folders.items()]
    options = ["--port", "0", "--metrics-port", "0", "--instances", "1", "--watch", "0", "--drain", "0", "--json"]
    arguments = ["serve", *models, "--target", target, *options]
    with _ready(arguments) as url:
        host, _, port = url.removeprefix("http://").rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=_ANSWER_S)
        with contextlib.closing(connection):
            yield connection


@contextlib.contextmanager
def _ready(arguments: list[str]) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        try:
            answer = stack.enter_context(started("kdexport", arguments, timeout_s=_START_S))
        except (ChildTimeoutError, ChildDiedError) as error:
            raise VerificationError(
                f"The server did not start within {error.seconds:g} s."
                if isinstance(error, ChildTimeoutError)
                else f"The server ended at its start with exit code {error.exit_code}: {error.said}",
                remedy="Run `kdexport serve` on both bundles and read what it says.",
            ) from None
        yield answer["url"]
