"""Requests generated from a grammar of the Open Inference Protocol whose rules may be broken."""

import gzip
import json
import random
import zlib
from typing import Any

_NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 7, 2**31, 2**63 - 1, 2**64, -(2**63), 10**40, 1.5, 1e308, -0.0, True, None, "3", [], {}, float("nan"),
    float("inf"),
)  # fmt: skip
_TEXTS: tuple[Any, ...] = (
    "", "input", "logits", "INPUT", "\x00", "..", "../../etc/passwd", "a" * 5000, "\u00e9\u2028", "%00", "{}", 3, None,
    ["input"],
)  # fmt: skip
_TYPES = ("FP32", "FP16", "FP64", "BF16", "INT8", "UINT8", "INT64", "BOOL", "BYTES", "fp32", "FLOAT", "", 7, None)
_BOMB = gzip.compress(bytes(60_000_000), 6)
_METHODS = ("POST", "GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "BREW")


class Grammar:
    """A seeded source of requests for a model of image side ``size``; each choice may be valid or not."""

    def __init__(self, model: str, size: int, seed: int) -> None:
        self._model, self._size, self._random = model, size, random.Random(seed)

    def request(self) -> bytes:
        """One request; about a third of them have exactly one fault."""
        pick = self._random
        if pick.random() < 0.04:
            return self._not_http()
        body, headers = self._body()
        if pick.random() < 0.15:
            body, headers = self._encoded(body, headers)
        method = "POST" if pick.random() < 0.9 else pick.choice(_METHODS)
        length: object = len(body)
        if pick.random() < 0.03:
            length = pick.choice((-1, 10**30, "x", "", "5, 5", 0))
        lines = [f"{method} {self._path()} HTTP/1.1", "Host: localhost", f"Content-Length: {length}"]
        if pick.random() < 0.04:
            lines = [lines[0], lines[1], "Transfer-Encoding: chunked"]
            body = self._chunked(body)
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if pick.random() < 0.05:
            lines.append(pick.choice(("X: " + "y" * 70_000, "Content-Type: \x7f", "Expect: 100-continue", ": no name")))
        return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + body

    def _path(self) -> str:
        pick = self._random
        if pick.random() < 0.85:
            return pick.choice((f"/v2/models/{self._model}/infer", f"/v2/models/{self._model}/versions/1/infer"))
        name = pick.choice((self._model, "nobody", "..", "%2e%2e%2f", "a" * 3000, "\u00e9", "%ff", "*"))
        version = pick.choice(("1", "0", "-1", "x", "9" * 40, "1/1", "%00"))
        return pick.choice((
            "/v2", "/v2/", "/v2/health/live", "/v2/health/ready", f"/v2/models/{name}", f"/v2/models/{name}/config",
            f"/v2/models/{name}/stats", f"/v2/models/{name}/versions/{version}/infer", "/v2/repository/index",
            f"/v2/models/{name}/infer?x={name}", "/v1/classify", f"/v1/classify?top={version}", "/openapi.json", "//",
            "/metrics", f"/{name}", "/v2/repository/models/x/load", "*", "http://localhost/v2",
        )).replace(" ", "%20")  # fmt: skip

    def _body(self) -> tuple[bytes, dict[str, str]]:
        pick = self._random
        if pick.random() < 0.05:
            return pick.randbytes(pick.choice((0, 1, 64, 5000))), {}
        document, raw = self._document()
        text = self._text(document)
        headers = {}
        if raw or pick.random() < 0.05:
            length: object = len(text)
            if pick.random() < 0.1:
                length = pick.choice((0, -1, len(text) + 1, len(text) - 1, 10**12, "x", "", 2**63))
            headers["Inference-Header-Content-Length"] = str(length)
        if pick.random() < 0.3:
            headers["Content-Type"] = pick.choice(
                ("application/json", "application/octet-stream", "text/html", "a/b;c")
            )
        return text + raw, headers

    def _text(self, document: Any) -> bytes:
        pick = self._random
        text = json.dumps(document)
        chance = pick.random()
        if chance < 0.02:
            depth = pick.choice((99, 101, 5000, 100_000))
            return text[:-1].encode() + b', "x": ' + b"[" * depth + b"]" * depth + b"}"
        if chance < 0.05:
            cut = pick.randrange(len(text))
            return text[:cut].encode()
        if chance < 0.08:
            data = bytearray(text.encode())
            for _ in range(pick.randrange(1, 6)):
                data[pick.randrange(len(data))] = pick.randrange(256)
            return bytes(data)
        if chance < 0.10:
            return text.encode("utf-16")
        return text.encode()

    def _document(self) -> tuple[Any, bytes]:
        pick = self._random
        raw = b""
        inputs = []
        for _ in range(1 if pick.random() < 0.95 else pick.choice((0, 2, 5, 300))):
            entry, data = self._input()
            inputs.append(entry)
            raw += data
        document: dict[str, Any] = {"inputs": inputs}
        if pick.random() < 0.3:
            outputs = [self._output() for _ in range(1 if pick.random() < 0.9 else pick.choice((0, 2, 9, 500)))]
            document["outputs"] = outputs
        if pick.random() < 0.2:
            document["id"] = pick.choice((*_TEXTS, *_NUMBERS)) if pick.random() < 0.3 else "request 7"
        if pick.random() < 0.15:
            document["parameters"] = self._parameters(("binary_data_output", "timeout", "priority", "sequence_id"))
        if pick.random() < 0.05:
            return pick.choice(([document], None, 3, "x", {"inputs": document}, {}, {"inputs": {}})), raw
        if pick.random() < 0.05:
            document[pick.choice(("nputs", "inputs", "outputs", "parameters"))] = pick.choice((*_TEXTS, *_NUMBERS))
        return document, raw

    def _input(self) -> tuple[Any, bytes]:
        pick = self._random
        good = [1, 3, self._size, self._size]
        shape: Any = list(good)
        if pick.random() < 0.12:
            shape[pick.randrange(4)] = pick.choice(_NUMBERS)
        if pick.random() < 0.04:
            shape = pick.choice(([], good[1:], good * 9, [good], None, "1,3", [0], [2, 3, self._size, self._size]))
        entry: dict[str, Any] = {"name": "input", "shape": shape, "datatype": "FP32"}
        if pick.random() < 0.1:
            entry["datatype"] = pick.choice(_TYPES)
        if pick.random() < 0.05:
            entry["name"] = pick.choice(_TEXTS)
        for key in ("name", "shape", "datatype"):
            if pick.random() < 0.015:
                del entry[key]
        return self._binary(entry) if pick.random() < 0.6 else self._listed(entry)

    def _binary(self, entry: dict[str, Any]) -> tuple[Any, bytes]:
        pick, count = self._random, 3 * self._size**2
        data = bytes(4 * count) if pick.random() < 0.92 else pick.randbytes(pick.choice((0, 1, 4 * count + 1, 40)))
        size: Any = len(data)
        if pick.random() < 0.08:
            size = pick.choice(_NUMBERS)
        entry["parameters"] = {"binary_data_size": size}
        if pick.random() < 0.05:
            entry["data"] = [1.0]
        return entry, data

    def _listed(self, entry: dict[str, Any]) -> tuple[Any, bytes]:
        pick, count = self._random, 3 * self._size**2
        values: Any = [0.5] * pick.choice((*(count,) * 12, 1, 0, count + 1))
        if pick.random() < 0.08 and values:
            values[pick.randrange(len(values))] = pick.choice((*_NUMBERS, *_TEXTS))
        if pick.random() < 0.05:
            values = pick.choice(([[values]], "x", None, {"0": 1}, [values, [1]], [[]] * 50))
        entry["data"] = values
        return entry, b""

    def _output(self) -> Any:
        pick = self._random
        if pick.random() < 0.05:
            return pick.choice((*_TEXTS, *_NUMBERS))
        entry: dict[str, Any] = {"name": "logits" if pick.random() < 0.8 else pick.choice(_TEXTS)}
        if pick.random() < 0.6:
            entry["parameters"] = self._parameters(("binary_data", "classification", "shared_memory_region"))
        return entry

    def _parameters(self, names: tuple[str, ...]) -> Any:
        pick = self._random
        if pick.random() < 0.1:
            return pick.choice((*_TEXTS, *_NUMBERS))
        return {pick.choice(names): pick.choice((*_NUMBERS, True, False, 5, "5")) for _ in range(pick.randrange(1, 3))}

    def _encoded(self, body: bytes, headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
        pick = self._random
        chance = pick.random()
        if chance < 0.3:
            return gzip.compress(body, 1), {**headers, "Content-Encoding": "gzip"}
        if chance < 0.6:
            return zlib.compress(body, 1), {**headers, "Content-Encoding": "deflate"}
        if chance < 0.7:
            return _BOMB, {**headers, "Content-Encoding": "gzip"}
        if chance < 0.85:
            packed = bytearray(gzip.compress(body, 1))
            packed[pick.randrange(len(packed))] ^= 0xFF
            return bytes(packed[: pick.randrange(1, len(packed) + 1)]), {**headers, "Content-Encoding": "gzip"}
        return body, {**headers, "Content-Encoding": pick.choice(("br", "gzip, gzip", "identity", "", "zip"))}

    def _chunked(self, body: bytes) -> bytes:
        pick = self._random
        size = pick.choice((7, 1000, 60_000))
        parts = [body[i : i + size] for i in range(0, len(body), size)][:5000]
        ends = pick.choice((b"0\r\n\r\n", b"0\r\n\r\n", b"-1\r\n", b"zz\r\n", b"0\r\nX: y\r\n\r\n"))
        return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + ends

    def _not_http(self) -> bytes:
        pick = self._random
        return pick.choice((
            pick.randbytes(pick.randrange(1, 300)), b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n\r\n",
            b"POST /v2 HTTP/1.1\r\n",
            b"GET /v2 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /v2 HTTP/1.0\r\n\r\n", b"POST /v2 HTTP/1.1\r\nHost: a\r\n"
            b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ))  # fmt: skip
