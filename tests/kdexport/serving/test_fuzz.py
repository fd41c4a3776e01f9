"""Generated requests and mutated images: no response is a 5xx, and the server stays alive and small.

KDEXPORT_FUZZ sets the number of requests; use 20,000 before a release.
"""

import http.client
import json
import os
import random
from typing import Any

import numpy as np

from tests.kdexport.serving.running_server import Running
from tests.kdexport.serving.served_bundles import encoded, photo

REQUESTS = int(os.environ.get("KDEXPORT_FUZZ", "3000"))
IMAGES = 600
MIB = 2**20

_WORDS = ["input", "logits", "", "zoo", "\x00", "\ud7ff", "a" * 300, "../x", "FP32", "BYTES", "\u202e", "1"]
_NUMBERS = [0, 1, -1, 3, 32, 8, 9, 2**31, 2**32 + 1, 2**63, -(2**63), 2**64, 1.5, 1e308, -0.0, 12288, True]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = rng.randrange(8 if depth < 4 else 5)
    if kind < 2:
        return rng.choice(_NUMBERS)
    if kind < 4:
        return rng.choice(_WORDS)
    if kind == 4:
        return rng.choice([None, True, False, [], {}])
    if kind == 5:
        return {rng.choice(_WORDS): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [value(rng, depth + 1) for _ in range(rng.randrange(5))]


def good(rng: random.Random) -> dict[str, Any]:
    """A valid request, binary or not."""
    count = rng.choice([1, 1, 2])
    tensor: dict[str, Any] = {"name": "input", "shape": [count, 3, 32, 32], "datatype": "FP32"}
    if rng.random() < 0.5:
        tensor["parameters"] = {"binary_data_size": 12288 * count}
    else:
        tensor["data"] = [round(rng.uniform(-2, 2), 2)] * (3072 * count)
    request: dict[str, Any] = {"inputs": [tensor]}
    if rng.random() < 0.5:
        parameters = rng.choice([{}, {"binary_data": True}, {"classification": 3}, {"classification": 2**30}])
        request["outputs"] = [{"name": "logits", "parameters": parameters}]
    if rng.random() < 0.3:
        request["id"] = rng.choice(_WORDS)
    if rng.random() < 0.3:
        request["parameters"] = {"binary_data_output": True, "timeout": 9_000_000}
    return request


def mutate(rng: random.Random, node: Any) -> Any:
    """``node`` with one place replaced, removed or doubled."""
    if isinstance(node, dict) and node and rng.random() < 0.9:
        key = rng.choice(sorted(node))
        action = rng.randrange(4)
        if action == 0:
            return {name: item for name, item in node.items() if name != key}
        if action == 1:
            return {**node, rng.choice([key, *_WORDS]): value(rng)}
        return {**node, key: mutate(rng, node[key])}
    if isinstance(node, list) and node and rng.random() < 0.9:
        index = rng.randrange(len(node))
        action = rng.randrange(4)
        if action == 0:
            return node[:index] + node[index + 1 :]
        if action == 1:
            return [*node, node[index]]
        return [*node[:index], mutate(rng, node[index]), *node[index + 1 :]]
    return value(rng)


def request(rng: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """(method, path, body, headers) of a valid or almost valid request."""
    header = good(rng)
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        header = mutate(rng, header)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        cut = rng.randrange(len(text) + 1)
        text = text[:cut] + bytes(rng.choices(range(256), k=rng.randrange(6))) + text[cut + rng.randrange(4) :]
    tail = bytes(rng.choice([0, 0, 12288, 12288, 24576, 12287, 5]))
    headers = {}
    if tail or rng.random() < 0.3:
        length = rng.choice([len(text)] * 6 + [0, 1, len(text) + 1, -1, 2**40])
        headers["Inference-Header-Content-Length"] = str(length)
    if rng.random() < 0.1:
        headers["Content-Encoding"] = rng.choice(["gzip", "deflate", "identity", "br", "", "gzip,deflate"])
    if rng.random() < 0.1:
        headers["Content-Type"] = rng.choice(["application/json", "text/plain", "a/b; boundary=x", "\t"])
    path = "/v2/models/zoo/infer" if rng.random() < 0.9 else rng.choice(
        ["/v2/models/zoo/versions/1/infer", "/v2/models/zoo/versions/x/infer", "/v2/models//infer",
         "/v1/classify?top=x", "/v2/models/zoo", "/v2/repository/index", "/v1/classify?model=%00"]
    )  # fmt: skip
    return rng.choice(["POST"] * 12 + ["GET", "PUT", "HEAD", "DELETE"]), path, text + tail, headers


def send(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, bytes]:
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    if response.status != 200 and method != "HEAD":
        assert set(json.loads(content)) == {"error"}, content
    return response.status, content


def test_no_generated_request_is_a_5xx(server: Running) -> None:
    rng = random.Random(20260714)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    before, statuses = server.peak(), dict[int, int]()
    for _ in range(REQUESTS):
        sent = request(rng)
        status, content = send(connection, *sent)
        statuses[status] = statuses.get(status, 0) + 1
        # A request with a timeout of a microsecond is refused because it waited longer.
        assert status < 500 or (status == 503 and b"waited" in content and b"timeout" in sent[2]), (status, sent)
    connection.close()
    # If all requests were refused for the same reason, only one line would be tested.
    assert statuses[200] > REQUESTS / 20
    assert statuses[400] > REQUESTS / 4
    assert server.peak() - before < 48 * MIB
    assert server.process.poll() is None


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut or double some bytes, or overwrite them with extreme values of length fields."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        at = rng.randrange(len(changed))
        action = rng.randrange(5)
        if action == 0:
            changed[at] = rng.randrange(256)
        elif action == 1:
            changed[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"])
        elif action == 2:
            del changed[at : at + rng.randrange(1, 40)]
        elif action == 3:
            changed[at:at] = changed[at : at + rng.randrange(1, 40)]
        else:
            # Sizes and counts are in the header.
            changed[rng.randrange(min(64, len(changed)))] = rng.randrange(256)
        if not changed:
            break
    return bytes(changed)


def test_no_mutated_image_is_a_5xx(server: Running) -> None:
    rng = random.Random(8)
    seeds = [
        encoded(photo(64, 48, 1), "JPEG"), encoded(photo(90, 70, 2), "JPEG", progressive=True, quality=40),
        encoded(photo(48, 64, 3), "PNG"), encoded(photo(50, 40, 4).convert("P"), "PNG"),
        encoded(photo(64, 48, 5), "WEBP"), encoded(photo(40, 40, 6), "WEBP", lossless=True),
    ]  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    statuses = np.zeros(600, int)
    for index in range(IMAGES):
        data = mutated(rng, seeds[index % len(seeds)])
        status, _ = send(connection, "POST", "/v1/classify", data, {})
        assert status in (200, 400, 413), (status, index)
        statuses[status] += 1
    connection.close()
    assert statuses[200] > 20
    assert statuses[400] > 100
    assert server.peak() < 300 * MIB
    assert server.process.poll() is None
