"""A server started by its command in a separate process, and a minimal client."""

import asyncio
import contextlib
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kdexport.serving.limits import Limits
from kdexport.serving.wire import Signature
from tests.answers import checked_answer

SIGNATURE = Signature(input_name="input", outputs=("logits",), image_size=32, classes=("a", "b", "c"), max_batch=8)
LIMITS = Limits()
_START_SECONDS = 240.0


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def data(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of an error response, whose only key is ``error``."""
        data = self.data
        assert set(data) == {"error"}
        return str(data["error"])


@dataclass(frozen=True)
class Running:
    """A started server."""

    process: "subprocess.Popen[str]"
    port: int
    metrics_port: int
    announced: dict[str, Any]
    log: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None,
        *, port: int = 0, seconds: float = 60.0,
    ) -> Answer:  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=seconds)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of /metrics with this name and labels; 0 if there are none yet."""
        text = self.ask("GET", "/metrics", port=self.metrics_port).body.decode()
        total = 0.0
        for line in text.splitlines():
            key, _, value = line.rpartition(" ")
            found, _, rest = key.partition("{")
            if found == name and all(f'{label}="{wanted}"' in rest for label, wanted in labels.items()):
                total += float(value)
        return total

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def resident(self) -> int:
        """The resident size in bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def peak(self) -> int:
        """The largest resident size so far, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def stop(self) -> str:
        """Send SIGTERM and wait; returns the output of the server on stderr."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        return self.log.read_text()


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "kdexport", "serve", *map(str, arguments), "--port", "0", "--metrics-port", "0"]


@contextlib.contextmanager
def running(*arguments: str | Path, cwd: Path | None = None) -> Iterator[Running]:
    """Start a server, wait for its line of JSON, and kill it at the end of the block."""
    with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        process = subprocess.Popen(
            [*command(*arguments), "--json"],
            stdout=subprocess.PIPE, stderr=log, text=True,
            cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            readable, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
            line = process.stdout.readline() if readable else ""
            assert line, Path(log.name).read_text()
            data = cast(dict[str, Any], checked_answer(line, 0)["result"])
            ports = [int(data[key].removesuffix("/metrics").rpartition(":")[2]) for key in ("url", "metrics_url")]
            yield Running(process, ports[0], ports[1], data, Path(log.name))
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def binary_request(images: Any, *, model: str = "zoo", **header: Any) -> tuple[bytes, dict[str, str]]:
    """(body, headers) of a binary inference request for (n,3,S,S) float32."""
    described = {
        "name": "input", "shape": list(images.shape), "datatype": "FP32",
        "parameters": {"binary_data_size": images.nbytes},
    }  # fmt: skip
    text = json.dumps({"inputs": [described], **header}).encode()
    return text + images.tobytes(), {"Inference-Header-Content-Length": str(len(text))}


async def call(
    app: Any, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None,
    *, sent: list[MutableMapping[str, Any]] | None = None,
) -> Answer:  # fmt: skip
    """One request to an ASGI application in this process; the messages of its response are appended to ``sent``."""
    messages: list[MutableMapping[str, Any]] = [] if sent is None else sent
    parts: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.sleep(60)
        return parts.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        messages.append(message)

    pairs = [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "headers": pairs,
        "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    return read_answer(messages)


def read_answer(messages: Sequence[MutableMapping[str, Any]]) -> Answer:
    """The response that ASGI messages carry."""
    start, *rest = messages
    headers = {key.decode(): value.decode() for key, value in start["headers"]}
    return Answer(start["status"], headers, b"".join(message.get("body", b"") for message in rest))
