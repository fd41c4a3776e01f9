"""Clients that load a server, and bundles that replace those that it serves."""

import hashlib
import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.kdexport.serving.running_server import Running, binary_request

CLIENTS = 8
BODY, HEADERS = binary_request(np.zeros((1, 3, 32, 32), np.float32))


@dataclass
class Load:
    """The responses that eight clients received."""

    answered: int = 0
    broken: list[str] = field(default_factory=list)
    statuses: set[int] = field(default_factory=set)
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


def client(port: int, load: Load) -> None:
    """Send requests until the port is closed or the test ends; a request without a response is broken."""
    connection: http.client.HTTPConnection | None = None
    while not load.stopped.is_set():
        if connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            try:
                connection.connect()
            except ConnectionRefusedError:
                return
        try:
            connection.request("POST", "/v2/models/zoo/infer", BODY, HEADERS)
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException) as error:
            with load.lock:
                load.broken.append(repr(error))
            connection = None
            continue
        with load.lock:
            load.answered += 1
            load.statuses.add(response.status)
        if response.getheader("connection", "") == "close":
            connection.close()
            connection = None
    if connection is not None:
        connection.close()


@contextmanager
def under_load(server: Running) -> Iterator[Load]:
    load = Load()
    threads = [threading.Thread(target=client, args=(server.port, load)) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 30
        while load.answered < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        yield load
    finally:
        load.stopped.set()
        for thread in threads:
            thread.join()


def rewritten(bundle: Path) -> str:
    """Write the manifest with other white space, so that the bundle is another one; returns its digest."""
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def swap(new: Path, place: Path) -> None:
    """Replace the folder ``place`` by ``new`` by renaming."""
    old = place.with_name("old")
    place.rename(old)
    new.rename(place)
    shutil.rmtree(old)


def wait_for(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)
