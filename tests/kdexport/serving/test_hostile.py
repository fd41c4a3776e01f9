"""Attacks on other model servers for which an advisory was published, one test for each class of them.

The names of the tests have the numbers of the advisories; the requests are our own.
"""

import gzip
import json
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.kdexport.serving.running_server import Answer, Running, binary_request
from tests.kdexport.serving.served_bundles import encoded, photo

INFER = "/v2/models/zoo/infer"
MIB = 2**20
ZEROS = np.zeros((1, 3, 32, 32), np.float32)


def post(server: Running, body: bytes, **headers: str) -> Answer:
    return server.ask("POST", INFER, body, {name.replace("_", "-"): value for name, value in headers.items()})


def as_json(**change: Any) -> bytes:
    tensor = {"name": "input", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": [0.5] * 3072, **change}
    return json.dumps({"inputs": [tensor]}).encode()


def refused(server: Running, answer: Answer, *statuses: int, growth: int = 64 * MIB, before: int = 0) -> None:
    """Assert a refusal in the protocol's form, by a server that is alive and whose memory has not grown."""
    assert answer.status in statuses, (answer.status, answer.body[:300])
    assert answer.error
    assert server.ask("GET", "/v2/health/ready").status == 200
    if before:
        assert server.peak() - before < growth


def test_cve_2025_23310_tiny_chunks_neither_recurse_nor_take_memory(server: Running) -> None:
    before = server.peak()
    body = as_json()
    with server.connect() as stream:
        stream.sendall(f"POST {INFER} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        stream.sendall(b"".join(b"1\r\n%c\r\n" % value for value in body) + b"0\r\n\r\n")
        assert stream.recv(100).startswith(b"HTTP/1.1 200")
    assert server.peak() - before < 32 * MIB


def test_cve_2026_24146_a_huge_number_of_outputs_is_refused(server: Running) -> None:
    outputs = [{"name": "logits"}] * 2
    body, headers = binary_request(ZEROS, outputs=outputs)
    refused(server, server.ask("POST", INFER, body, headers), 400)
    before = server.peak()
    for count in (9, 3000, 400_000):
        data = json.dumps({**json.loads(as_json()), "outputs": [{"name": str(n)} for n in range(count)]}).encode()
        refused(server, post(server, data), 400, 413, before=before)


@pytest.mark.parametrize(
    "shape",
    [
        [2**62, 3, 32, 32], [2**63, 3, 32, 32], [1, 3, 32, -32], [-1, -3, 32, 32], [0, 3, 32, 32], [1] * 60 + [3072],
        [4294967297, 3, 32, 32], [1.0, 3, 32, 32], ["1", 3, 32, 32], [True, 3, 32, 32], [], None, [10**400],
        [65536, 65536, 65536, 65536],
    ],
    ids=str,
)  # fmt: skip
def test_cve_2026_24173_overflowing_and_negative_shapes_are_refused(server: Running, shape: Any) -> None:
    refused(server, post(server, as_json(shape=shape)), 400)
    text = json.dumps(
        {"inputs": [{"name": "input", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": 12288}}]}
    ).encode()
    answer = post(server, text + bytes(12288), Inference_Header_Content_Length=str(len(text)))
    refused(server, answer, 400)


@pytest.mark.parametrize("size", [-1, 0, 1, 12287, 12289, 2**31, 2**63, 2**64 + 12288, 1.5, "12288", None, True])
def test_cve_2025_23320_a_wrong_binary_size_is_refused(server: Running, size: Any) -> None:
    body, headers = binary_request(ZEROS)
    length = int(headers["Inference-Header-Content-Length"])
    header = json.loads(body[:length])
    header["inputs"][0]["parameters"]["binary_data_size"] = size
    text = json.dumps(header).encode()
    refused(server, post(server, text + body[length:], Inference_Header_Content_Length=str(len(text))), 400)


@pytest.mark.parametrize("length", ["-1", "1", "99999999999", "9" * 40, "0x10", "1e3", "", " ", "10, 20", "12288.0"])
def test_a_wrong_header_length_is_refused(server: Running, length: str) -> None:
    body, _ = binary_request(ZEROS)
    refused(server, post(server, body, Inference_Header_Content_Length=length), 400)


@pytest.mark.parametrize("region", ["", "kdexport", "/dev/shm/x", "../../etc/passwd"])
def test_cve_2025_23319_shared_memory_cannot_be_named(server: Running, region: str) -> None:
    parameters = {"shared_memory_region": region, "shared_memory_byte_size": 64, "shared_memory_offset": 2**63}
    body = {"name": "input", "shape": [1, 3, 32, 32], "datatype": "FP32", "parameters": parameters}
    refused(server, post(server, json.dumps({"inputs": [body]}).encode()), 400)
    wanted, headers = binary_request(ZEROS, outputs=[{"name": "logits", "parameters": parameters}])
    refused(server, server.ask("POST", INFER, wanted, headers), 400)
    for path in ("/v2/systemsharedmemory/region/x/register", "/v2/cudasharedmemory/region/x/register"):
        refused(server, server.ask("POST", path, b"{}"), 404)


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/..%2f..%2fetc/infer", "/v2/models/%2e%2e/config", "/v2/models/zoo%00/config",
        "/v2/models/zoo/versions/..%2f1/config", "/v2/models/zoo/versions/01/config",
        "/v2/models/zoo/versions/%D9%A1/config", "/v2/models/" + "a" * 5000, "/v2/models/%ff%fe",
        "/v2/repository/models/zoo/load", "/v2/repository/models/zoo/unload", "/../../etc/passwd", "//etc/passwd",
        "/v2/models/zoo/versions/1/../../../../x",
    ],
)  # fmt: skip
def test_cve_2026_24208_paths_open_no_file_and_load_no_model(server: Running, path: str) -> None:
    for method in ("GET", "POST"):
        refused(server, server.ask(method, path, b"{}"), 404, 405)


def test_cve_2025_27520_pickles_are_never_unpickled(server: Running) -> None:
    hostile = b"cos\nsystem\n(S'touch pwned'\ntR."
    for kind in ("application/vnd.bentoml+pickle", "application/octet-stream", "application/x-python-serialize"):
        refused(server, post(server, hostile, Content_Type=kind), 400)
        refused(server, server.ask("POST", "/v1/classify", hostile, {"Content-Type": kind}), 400)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"inputs":[', b"[[[[["])
@pytest.mark.parametrize("depth", [101, 9_000])
def test_deep_json_is_refused_before_it_is_parsed(server: Running, opening: bytes, depth: int) -> None:
    answer = post(server, opening * depth)
    refused(server, answer, 400)
    assert "levels deep (up to 100 allowed). Send the data as one flat array." in answer.error


def test_wide_json_is_refused_before_it_is_parsed(server: Running) -> None:
    before = server.peak()
    for token in (b"{},", b"[],", b"0,", b'"",'):
        count = 600_000 // len(token)
        answer = post(server, b'{"inputs":[' + token * count + b"0]}")
        refused(server, answer, 413, before=before, growth=16 * MIB)
        assert re.match(r"The JSON has [\d,]+ elements \(up to [\d,]+ allowed\)\.", answer.error)


def test_one_long_string_among_numbers_does_not_widen_the_others(server: Running) -> None:
    # As one array of strings, these would take 4 bytes x 300,000 characters for each of 3,072 elements.
    before = server.peak()
    answer = post(server, as_json(data=["x" * 300_000] + ["y"] * 3071))
    refused(server, answer, 400, before=before, growth=16 * MIB)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_decompression_bomb_is_413_at_the_limit(server: Running, encoding: str) -> None:
    before = server.peak()
    bomb = gzip.compress(bytes(300 * MIB), 6) if encoding == "gzip" else zlib.compress(bytes(100 * MIB), 6)
    answer = post(server, bomb, Content_Encoding=encoding)
    refused(server, answer, 413, before=before)
    answer = server.ask("POST", "/v1/classify", bomb, {"Content-Encoding": encoding})
    refused(server, answer, 413, before=before)
    assert answer.error == "The body decompresses to more than 16,777,216 bytes. Send less in one request."


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (b"not gzip", "gzip", 400),
        (gzip.compress(b"{}")[:-5], "gzip", 400),
        (gzip.compress(b"{}") + b"tail", "gzip", 400),
        (zlib.compress(b"{}") * 2, "deflate", 400),
        (b"{}", "br", 415),
        (gzip.compress(gzip.compress(b"{}")), "gzip, gzip", 415),
    ],
    ids=["foreign", "cut", "tail", "two streams", "unknown", "two layers"],
)
def test_damaged_and_foreign_encodings_are_refused(server: Running, body: bytes, encoding: str, status: int) -> None:
    refused(server, post(server, body, Content_Encoding=encoding), status)


def test_a_huge_body_is_413_without_being_held(server: Running) -> None:
    before = server.peak()
    answer = post(server, bytes(150 * MIB))
    refused(server, answer, 413, before=before, growth=16 * MIB)
    assert "The body has 157,286,400 bytes (up to" in answer.error


def test_a_huge_body_without_a_length_is_413_at_the_limit(server: Running) -> None:
    before = server.peak()
    with server.connect() as stream:
        stream.sendall(f"POST {INFER} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(40):
            stream.sendall(b"100000\r\n" + bytes(MIB) + b"\r\n")
        stream.sendall(b"0\r\n\r\n")
        assert stream.recv(100).startswith(b"HTTP/1.1 413")
    assert server.peak() - before < 16 * MIB


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_in_both_forms(server: Running, value: float) -> None:
    data = [0.5] * 3072
    data[700] = value
    refused(server, post(server, as_json(data=data)), 400)
    images = ZEROS.copy()
    images[0, 1, 7, 9] = value
    body, headers = binary_request(images)
    answer = server.ask("POST", INFER, body, headers)
    refused(server, answer, 400)
    assert answer.error == "Input 'input' has NaN or infinity; all values must be finite."


@pytest.mark.parametrize(
    "data",
    [None, "x", 1, {}, {"a": 1}, [[1.0]], [[0.5] * 3072, 1], ["0.5"] * 3072, [True] * 3072, [None] * 3072,
     [10**400] + [0] * 3071, [1e39] * 3072, [0.5] * 3071, [0.5] * 3073, [[[[0.5] * 32] * 32] * 3] * 2,
     [[[0.5] * 32] * 32] * 3, [[[[0.5] * 32] * 32] * 2 + [[[0.5] * 31] * 32]]],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_data_of_another_form_is_refused(server: Running, data: Any) -> None:
    refused(server, post(server, as_json(data=data)), 400)


def test_data_nested_like_its_shape_is_accepted(server: Running) -> None:
    flat = post(server, as_json(data=[n / 3072 for n in range(3072)]))
    nested = np.asarray([n / 3072 for n in range(3072)]).reshape(1, 3, 32, 32).tolist()
    assert post(server, as_json(data=nested)).data == flat.data
    assert flat.status == 200


def test_an_output_listed_twice_is_refused(server: Running) -> None:
    body, headers = binary_request(ZEROS, outputs=[{"name": "logits"}, {"name": "logits"}])
    answer = server.ask("POST", INFER, body, headers)
    refused(server, answer, 400)
    assert answer.error == "The request lists the same output twice. List each output once."


def test_a_sequence_is_refused_because_the_server_keeps_no_state(server: Running) -> None:
    body, headers = binary_request(ZEROS, parameters={"sequence_id": 7})
    refused(server, server.ask("POST", INFER, body, headers), 400)


def png(width: int, height: int) -> bytes:
    """A PNG whose header announces more pixels than its data has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (encoded(Image.new("1", (60_000, 1)), "PNG"), 400),
        (encoded(Image.new("1", (1, 60_000)), "PNG"), 400),
        (png(2**31 - 1, 2**31 - 1), 400),
        (png(50_000, 50_000), 400),
        (png(2001, 2000), 413),
        (png(1999, 1999), 400),
        (png(0, 0), 400),
        (b"RIFF\x40\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x02\x00\x00\x00\xfe\x3f\x00\xfe\x3f\x00" + bytes(64), 413),
        (b"RIFF\x40\x00\x00\x00WEBPVP8L\x0a\x00\x00\x00\x2f\xff\xff\xff\x0f" + bytes(64), 413),
    ],
    ids=["60000x1", "1x60000", "2G x 2G", "50k x 50k", "just above", "just below", "0x0", "webp", "webp lossless"],
)
def test_an_image_bomb_is_refused_by_its_header(server: Running, data: bytes, status: int) -> None:
    before = server.peak()
    refused(server, server.ask("POST", "/v1/classify", data), status, before=before, growth=24 * MIB)


def test_cve_2026_40192_other_image_formats_are_not_parsed(server: Running) -> None:
    fits = (
        b"SIMPLE  =                    T" + b" " * 50 + b"BITPIX  =                    8".ljust(80) + b"END".ljust(2800)
    )
    for data in (fits, b"%!PS-Adobe-3.0\n", b"P6 9 9 255\n" + bytes(243), b"\x00\x00\x01\x00\x01\x00" + bytes(99)):
        refused(server, server.ask("POST", "/v1/classify", data), 400)


def test_a_text_chunk_bomb_in_a_png_is_refused(server: Running) -> None:
    before = server.peak()
    good = encoded(photo(40, 40, 1), "PNG")
    packed = b"k\x00\x00" + zlib.compress(bytes(200 * MIB), 9)
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed + struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    refused(server, server.ask("POST", "/v1/classify", good[:33] + chunk + good[33:]), 400, before=before)


@pytest.mark.parametrize(
    "head",
    [
        b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\nGET /v2 HTTP/1.1\r\n\r\n",
        b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"POST %s HTTP/1.1\r\nHost: a\r\nA: b\r\n c\x00d\r\n\r\n",
        b"POST %s HTTP/9.9\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=["both lengths", "two lengths", "negative", "overflow", "coding", "space", "folded", "version", "tls", "http2"],
)
def test_request_smuggling_is_one_error_and_a_closed_connection(server: Running, head: bytes) -> None:
    with server.connect() as stream:
        stream.sendall(head.replace(b"%s", INFER.encode()))
        received = b""
        while part := stream.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1 ") == 1
    assert received.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("head", [b"GET /" + b"a" * 200_000, b"GET /v2 HTTP/1.1\r\n" + b"a: b\r\n" * 40_000])
def test_cve_2025_54121_an_endless_header_is_refused(server: Running, head: bytes) -> None:
    before = server.peak()
    with server.connect() as stream:
        try:
            stream.sendall(head)
            received = stream.recv(65536)
        except (BrokenPipeError, ConnectionResetError):
            received = b"HTTP/1.1 431"
    assert received.startswith(b"HTTP/1.1 431")
    assert server.peak() - before < 8 * MIB


def test_header_injection_into_answers_is_not_possible(server: Running) -> None:
    header = {"id": "x\r\nSet-Cookie: a=b", "inputs": json.loads(as_json())["inputs"]}
    answer = post(server, json.dumps(header).encode())
    assert answer.status == 200
    assert answer.data["id"] == "x\r\nSet-Cookie: a=b"
    assert "set-cookie" not in answer.headers


def test_errors_quote_at_most_a_part_of_a_long_input(server: Running) -> None:
    answer = post(server, as_json(name="n" * 200))
    assert len(answer.body) < 400
    answer = post(server, json.dumps({"inputs": [{"name": "<script>" * 9000}]}).encode())
    refused(server, answer, 400)
    assert len(answer.body) < 400
