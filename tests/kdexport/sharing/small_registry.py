"""An OCI registry in this process, with as much of the distribution specification as one client needs."""

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Registry:
    """Blobs by digest and manifests by tag; ``requests`` are the methods and paths that were asked."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.host = ""


class _Handler(BaseHTTPRequestHandler):
    registry: Registry

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.registry.requests.append(f"{self.command} {self.path}")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if found := re.search(r"/blobs/(sha256:\w+)$", self.path):
            blob = self.registry.blobs.get(found[1])
            self._answer(404 if blob is None else 200, blob or b"{}")
        else:
            manifest = self.registry.manifests.get(self.path.rpartition("/")[2])
            self._answer(404 if manifest is None else 200, manifest or b'{"errors": []}')

    def do_POST(self) -> None:
        self._body()
        self._answer(202, Location=f"http://{self.registry.host}/upload")

    def do_PUT(self) -> None:
        body = self._body()
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if "/manifests/" in self.path:
            self.registry.manifests[self.path.rpartition("/")[2]] = body
        else:
            (asked,) = parse_qs(urlsplit(self.path).query)["digest"]
            assert asked == digest
            self.registry.blobs[digest] = body
        self._answer(201, Docker_Content_Digest=digest)


@contextlib.contextmanager
def running_registry() -> Iterator[Registry]:
    """A registry on a free port of this machine, until the block ends."""
    registry = Registry()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"registry": registry}))
    registry.host = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
