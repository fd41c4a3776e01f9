"""Slow, many or disconnected clients do not affect the others."""

import http.client
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from tests.kdexport.serving.running_server import LIMITS, Answer, Running, binary_request

INFER = "/v2/models/zoo/infer"
MAX_REQUESTS = LIMITS.places(2)
SLOW_CLIENTS = 1200
ZEROS = np.zeros((1, 3, 32, 32), np.float32)


def head(body: bytes, headers: dict[str, str], path: str = INFER) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: a",
        f"Content-Length: {len(body)}",
        *(f"{k}: {v}" for k, v in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def received(stream: socket.socket) -> bytes:
    """All bytes until the server closes the connection."""
    data = b""
    try:
        while part := stream.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def reply(stream: socket.socket) -> Answer:
    """One complete response."""
    response = http.client.HTTPResponse(stream)
    response.begin()
    return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


@contextmanager
def open_connections(server: Running, opening: bytes) -> Iterator[list[socket.socket]]:
    """1,200 connections that send ``opening`` and then nothing."""
    with ExitStack() as stack:
        streams = []
        for _ in range(SLOW_CLIENTS):
            stream = stack.enter_context(server.connect())
            stream.setblocking(False)
            streams.append(stream)
            try:
                stream.send(opening)
            except OSError:
                continue
        yield streams


def probes(server: Running, count: int = 20) -> int:
    """The number of health probes that were answered within five seconds."""
    answered = 0
    for _ in range(count):
        try:
            answered += server.ask("GET", "/v2/health/ready", seconds=5).status == 200
        except OSError:
            continue
    return answered


@pytest.mark.parametrize(
    "opening",
    [
        b"",
        b"GET /v2 HTTP/1.1\r\nHost: a\r\nX-Slow: ",
        b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: 9000\r\n\r\nabc",
    ],
    ids=["nothing", "half a header", "half a body"],
)
def test_1200_slow_connections_leave_health_probes_answered(server: Running, opening: bytes) -> None:
    with open_connections(server, opening):
        assert probes(server) >= 18
    until(lambda: server.metric("nv_inference_pending_request_count") == 0)
    assert server.ask("POST", INFER, *binary_request(ZEROS)).status == 200


def test_1200_slow_readers_leave_health_probes_answered(server: Running) -> None:
    # Several requests for a document of 20 kB that the client does not read.
    with open_connections(server, b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 4):
        assert probes(server) >= 18
    assert server.peak() < 300 * 2**20


def test_thousands_of_requests_in_one_packet_end_the_connection(server: Running) -> None:
    before = server.peak()
    with server.connect() as stream:
        stream.sendall(b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n" * 2000)
        assert received(stream).count(b"HTTP/1.1 200") < 20
    assert server.peak() - before < 8 * 2**20


def test_connections_are_bounded_and_the_longest_idle_one_goes_first(server: Running) -> None:
    before = server.metric("kdexport_evicted_connections_total")
    with open_connections(server, b"") as streams:
        until(lambda: server.metric("kdexport_evicted_connections_total") - before >= SLOW_CLIENTS - 512)
        assert server.metric("kdexport_connections") <= 512
        streams[0].setblocking(True)
        assert received(streams[0]) == b""


@pytest.mark.parametrize(
    "opening", [b"", b"GET /v2 HTTP/1.1\r\nX: ", b"\r\n\r\n\r\n"], ids=["nothing", "part", "line ends"]
)
def test_a_header_that_does_not_arrive_ends_the_connection(server: Running, opening: bytes) -> None:
    with server.connect() as stream:
        began = time.monotonic()
        stream.sendall(opening)
        answer = received(stream)
        assert answer.startswith(b"HTTP/1.1 408")
        assert answer.endswith(b'{"error": "The request header did not arrive within 2 s."}')
        assert 1.5 < time.monotonic() - began < 12


def test_a_header_that_arrives_slowly_gets_no_more_time(server: Running) -> None:
    with server.connect() as stream:
        began = time.monotonic()
        stream.sendall(b"GET /v2 HTTP/1.1\r\n")
        try:
            for number in range(200):
                stream.sendall(b"X-%d: y\r\n" % number)
                time.sleep(0.1)
        except OSError:
            pass
        assert time.monotonic() - began < 12


def test_line_ends_between_requests_do_not_keep_a_connection(server: Running) -> None:
    with server.connect() as stream:
        stream.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        assert stream.recv(65536).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        try:
            while time.monotonic() - began < 20:
                stream.sendall(b"\r\n")
                time.sleep(0.2)
        except OSError:
            pass
        assert time.monotonic() - began < 15


def test_a_body_that_does_not_arrive_is_408_and_frees_its_place(server: Running) -> None:
    body, headers = binary_request(ZEROS)
    with server.connect() as stream:
        stream.sendall(head(body, headers) + body[:100])
        until(lambda: server.metric("nv_inference_pending_request_count") == 1)
        answer = reply(stream)
    assert answer.status == 408
    assert answer.error == ("The body did not arrive within 4 s. Send it again, over a faster connection or smaller.")
    until(lambda: server.metric("nv_inference_pending_request_count") == 0)


def test_at_capacity_a_request_is_429_before_its_body_is_read_and_a_disconnect_frees_the_place(server: Running) -> None:
    body, headers = binary_request(ZEROS)
    with ExitStack() as stack:
        streams = [stack.enter_context(server.connect()) for _ in range(MAX_REQUESTS)]
        for stream in streams:
            stream.sendall(head(body, headers))
        # Not a byte of this body is sent: the answer comes from the header alone.
        with server.connect() as late:
            late.sendall(head(body, headers))
            answer = reply(late)
        assert answer.status == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.error == "The server is at capacity: 36 requests in progress (limit 36). Retry later."
        assert server.ask("GET", "/v2/health/ready").status == 200
    until(lambda: server.metric("nv_inference_pending_request_count") == 0)
    assert server.ask("POST", INFER, body, headers).status == 200
    assert server.metric("nv_inference_request_failure", reason="canceled") >= MAX_REQUESTS


def test_a_client_that_disconnects_in_the_queue_frees_its_place(server: Running) -> None:
    body, headers = binary_request(np.zeros((8, 3, 32, 32), np.float32))
    for _ in range(30):
        with server.connect() as stream:
            stream.sendall(head(body, headers) + body)
    until(lambda: server.metric("nv_inference_pending_request_count") == 0)
    assert server.ask("POST", INFER, body, headers).status == 200


def test_the_sum_of_all_bodies_is_limited(server: Running) -> None:
    # Nine bodies of 15 MiB are announced; eight fit into 128 MiB.
    announced = b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: 15728640\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(server.connect()).sendall(announced)
        until(lambda: server.metric("nv_inference_pending_request_count") == 8)
        with server.connect() as late:
            late.sendall(announced)
            answer = reply(late)
        assert answer.status == 429
        assert answer.error == (
            "The server is at capacity: the bodies of requests in progress have up to 125,829,120 bytes, and this one "
            "up to 15,728,640 (limit 134,217,728 together). Retry later."
        )
        assert server.ask("POST", INFER, *binary_request(ZEROS)).status == 200
    until(lambda: server.metric("nv_inference_pending_request_count") == 0)


def test_expect_100_continue_gets_the_refusal_and_the_connection_ends(server: Running) -> None:
    with server.connect() as stream:
        stream.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
        )
        assert received(stream).startswith(b"HTTP/1.1 413")


def test_expect_100_continue_gets_a_100(server: Running) -> None:
    body, headers = binary_request(ZEROS)
    with server.connect() as stream:
        stream.sendall(head(body, {**headers, "Expect": "100-continue"}))
        assert stream.recv(65536).startswith(b"HTTP/1.1 100")
        stream.sendall(body)
        assert stream.recv(65536).startswith(b"HTTP/1.1 200")


def test_requests_after_a_refused_body_use_the_same_connection(server: Running) -> None:
    good, headers = binary_request(ZEROS)
    bad = bytes(3 * 2**20)
    with server.connect() as stream:
        stream.sendall(head(bad, headers) + bad)
        assert reply(stream).status == 413
        stream.sendall(head(good, headers) + good)
        assert reply(stream).status == 200


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    paths = ["/v2/health/live", "/v2", "/nothing", "/v2/models/zoo"]
    with server.connect() as stream:
        last = [
            f"GET {p} HTTP/1.1\r\nHost: a\r\n{'Connection: close' if p == paths[-1] else 'A: b'}\r\n\r\n" for p in paths
        ]
        stream.sendall("".join(last).encode())
        data = received(stream)
    assert [int(part[:3]) for part in data.split(b"HTTP/1.1 ")[1:]] == [200, 200, 404, 200]


@pytest.mark.parametrize("together", [True, False])
def test_an_invalid_chunk_is_400_and_frees_its_place(server: Running, together: bool) -> None:
    opening = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n".encode()
    for _ in range(MAX_REQUESTS + 1):
        with server.connect() as stream:
            if together:
                stream.sendall(opening + b"xyz\r\n")
            else:
                stream.sendall(opening)
                time.sleep(0.05)
                stream.sendall(b"xyz\r\n")
            answer = reply(stream)
            assert (answer.status, answer.headers["connection"]) == (400, "close")
            assert answer.error == "The request is not valid HTTP/1.1, or has too many pipelined requests."
            assert received(stream) == b""
    body, headers = binary_request(ZEROS)
    assert server.ask("POST", INFER, body, headers).status == 200


@pytest.mark.parametrize(
    "junk", [b"\x00\x01 no request\r\n\r\n", b"G\xffT / HTTP/1.1\r\n\r\n", b"\r\n\r\nPOST /v2 HTTP/9.9\r\n\r\n"]
)
def test_invalid_bytes_after_a_complete_request_do_not_affect_its_response(server: Running, junk: bytes) -> None:
    body, headers = binary_request(ZEROS)
    for after in (junk, b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n" + junk):
        with server.connect() as stream:
            stream.sendall(head(body, headers) + body + after)
            answered = received(stream)
            assert answered.startswith(b"HTTP/1.1 200")
            assert answered.count(b"HTTP/1.1 ") == 1 + after.count(b"/v2 HTTP/1.1")
