"""The clock ``serve``: requests to the real HTTP server, which runs in its own process, over a kept-alive connection.

A server runs one target, so two arms with different targets have two servers.
"""

import contextlib
import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdexport.core.child import ChildDiedError, ChildTimeoutError, started
from kdexport.errors import VerificationError
from kdexport.timing.measure import Run

#: Seconds until a server must be ready, and until it must respond.
_START_S, _RESPONSE_S = 120.0, 60.0


@dataclass(frozen=True, slots=True)
class Client:
    """A kept-alive connection to the server of each model."""

    connections: dict[str, http.client.HTTPConnection]

    def request(self, model: str, images: NDArray[np.float32]) -> Run:
        """A callable that sends (n,3,S,S) float32 as a raw binary request and reads the whole response.

        To a model that takes pixels it sends as many images of zeros: the time does not depend on the values.
        """
        connection, path = self.connections[model], f"/v2/models/{model}/infer"
        body = _body(connection, model, images)
        headers = {"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"}

        def send() -> None:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise VerificationError(
                    f"The server responded with status {response.status} (200 expected): "
                    f"{content[:200].decode(errors='replace')}",
                    remedy="Pass --batch with a size that the bundle was exported for.",
                )

        return send


def _body(connection: http.client.HTTPConnection, model: str, images: NDArray[np.float32]) -> bytes:
    connection.request("GET", f"/v2/models/{model}")
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise VerificationError(
            f"The server responded with status {response.status} (200 expected) to a request for the metadata of "
            f"{model}.",
            remedy="Run `kdexport serve` with the bundle to see its error.",
        )
    pixels = json.loads(content)["inputs"][0]["datatype"] == "UINT8"
    return bytes(images.size) if pixels else images.tobytes()


@contextlib.contextmanager
def serving(arms: dict[str, tuple[str, str]]) -> Iterator[Client]:
    """Serve arms, (bundle folder, target) by name, with one instance each; the servers stop when the block ends."""
    with contextlib.ExitStack() as stack:
        connections: dict[str, http.client.HTTPConnection] = {}
        for target in dict.fromkeys(target for _, target in arms.values()):
            folders = {name: folder for name, (folder, its_target) in arms.items() if its_target == target}
            connections |= dict.fromkeys(folders, stack.enter_context(_server(folders, target)))
        yield Client(connections)


@contextlib.contextmanager
def _server(folders: dict[str, str], target: str) -> Iterator[http.client.HTTPConnection]:
    models = [f"{name}={folder}" for name, folder in folders.items()]
    options = ["--port", "0", "--metrics-port", "0", "--instances", "1", "--watch", "0", "--drain", "0", "--json"]
    arguments = ["serve", *models, "--target", target, *options]
    with _ready(arguments) as url:
        host, _, port = url.removeprefix("http://").rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=_RESPONSE_S)
        with contextlib.closing(connection):
            yield connection


@contextlib.contextmanager
def _ready(arguments: list[str]) -> Iterator[str]:
    """Start a server; its URL once it is ready."""
    with contextlib.ExitStack() as stack:
        try:
            announced = stack.enter_context(started("kdexport", arguments, timeout_s=_START_S))
        except (ChildTimeoutError, ChildDiedError) as error:
            raise VerificationError(
                f"The server was not ready within {error.seconds:g} s."
                if isinstance(error, ChildTimeoutError)
                else f"The server exited during startup with code {error.exit_code}: {error.stderr}",
                remedy="Run `kdexport serve` with each bundle to see its error.",
            ) from None
        yield announced["result"]["url"]
