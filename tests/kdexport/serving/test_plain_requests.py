"""What the second reader of HTTP takes is understood in the same way by the first, and by any other."""

import random
import string

import httptools
import pytest

from kdexport.serving.plain_requests import PlainHead, PlainHeads, read_head
from kdexport.serving.requests import INLINE_BYTES

INFER = "POST /v2/models/zoo/infer HTTP/1.1"
HOST, LENGTH = "Host: a", "Content-Length: 12"


def head(*lines: str) -> bytes:
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def test_a_plain_head_is_read() -> None:
    raw = head(
        "POST /v2/models/zoo-1.a/versions/12/infer HTTP/1.1", "HOST:a:80", "content-length: 12",
        "Connection: Keep-Alive", "inference-header-content-length: 7", "Authorization: Bearer x y", "X-Request-ID: r",
    )  # fmt: skip
    found = read_head(raw)
    assert found is not None
    assert (found.size, found.length, found.model, found.version) == (len(raw), 12, "zoo-1.a", "12")
    assert (found.path, found.header_length, found.authorization) == (
        "/v2/models/zoo-1.a/versions/12/infer", 7, "Bearer x y",
    )  # fmt: skip
    assert found.fields[b"x-request-id"] == b"r"
    found = read_head(head("POST /v1/classify?top=3&model=zoo HTTP/1.1", HOST, LENGTH))
    assert found is not None
    assert (found.model, found.path, dict(found.query)) == (None, "/v1/classify", {"top": "3", "model": "zoo"})


@pytest.mark.parametrize(
    "lines",
    [
        (INFER, HOST, LENGTH, "Transfer-Encoding: chunked"),
        (INFER, HOST, LENGTH, "transfer-encoding : chunked"),
        (INFER, HOST, "Transfer-Encoding: identity"),
        (INFER, HOST, LENGTH, LENGTH),
        (INFER, HOST, LENGTH, "content-length: 13"),
        (INFER, HOST, HOST, LENGTH),
        (INFER, HOST, LENGTH, "Authorization: a", "authorization: b"),
        (INFER, HOST, "Content-Length: 12, 12"),
        (INFER, HOST, "Content-Length: +12"),
        (INFER, HOST, "Content-Length: 0x12"),
        (INFER, HOST, "Content-Length: -1"),
        (INFER, HOST, "Content-Length: 0"),
        (INFER, HOST, "Content-Length: 012"),
        (INFER, HOST, "Content-Length: 1 2"),
        (INFER, HOST, "Content-Length: \xb2"),
        (INFER, HOST, "Content-Length: "),
        (INFER, HOST, "Content-Length:  12"),
        (INFER, HOST, "Content-Length: 12 "),
        (INFER, HOST, "Content-Length:\t12"),
        (INFER, HOST, "Content-Length : 12"),
        (INFER, HOST, " Content-Length: 12"),
        (INFER, HOST, "Content-Length\x00: 12"),
        (INFER, HOST, f"Content-Length: {INLINE_BYTES + 1}"),
        (INFER, HOST, "Content-Length: 999999999999"),
        (INFER, HOST),
        (INFER, LENGTH),
        (INFER, HOST, LENGTH, "User-Agent: a", " folded"),
        (INFER, HOST, LENGTH, "User-Agent: a\n b"),
        (INFER, HOST, LENGTH, "User-Agent: a\rb"),
        (INFER, HOST, LENGTH, "User-Agent: \xe9"),
        (INFER, HOST, LENGTH, "User-Agent: a\x7f"),
        (INFER, HOST, LENGTH, ": no name"),
        (INFER, HOST, LENGTH, "no colon"),
        (INFER, HOST, LENGTH, "Expect: 100-continue"),
        (INFER, HOST, LENGTH, "Upgrade: h2c"),
        (INFER, HOST, LENGTH, "Connection: close"),
        (INFER, HOST, LENGTH, "Connection: keep-alive, Upgrade"),
        (INFER, HOST, LENGTH, "Content-Encoding: gzip"),
        (INFER, HOST, LENGTH, "Origin: http://a"),
        (INFER, HOST, LENGTH, "X-Unknown: 1"),
        (INFER, HOST, LENGTH, "Content-Type: Multipart/form-data; boundary=x"),
        (INFER, HOST, LENGTH, "Inference-Header-Content-Length: x"),
        (INFER, HOST, LENGTH, "Inference-Header-Content-Length: -1"),
        ("POST /v2/models/zoo/infer HTTP/1.0", HOST, LENGTH),
        ("POST /v2/models/zoo/infer HTTP/1.1 ", HOST, LENGTH),
        ("POST  /v2/models/zoo/infer HTTP/1.1", HOST, LENGTH),
        ("POST\t/v2/models/zoo/infer HTTP/1.1", HOST, LENGTH),
        (" POST /v2/models/zoo/infer HTTP/1.1", HOST, LENGTH),
        ("\r\nPOST /v2/models/zoo/infer HTTP/1.1", HOST, LENGTH),
        ("post /v2/models/zoo/infer HTTP/1.1", HOST, LENGTH),
        ("GET /v2/models/zoo/infer HTTP/1.1", HOST, LENGTH),
        ("POST http://a/v2/models/zoo/infer HTTP/1.1", HOST, LENGTH),
        ("POST /v2/models/z%6fo/infer HTTP/1.1", HOST, LENGTH),
        ("POST /v2/models/zoo/infer?x=1 HTTP/1.1", HOST, LENGTH),
        ("POST /v2/models/zoo/infer#x HTTP/1.1", HOST, LENGTH),
        ("POST /v2/models/zoo/infer/ HTTP/1.1", HOST, LENGTH),
        ("POST /v2/models/zo\xf6/infer HTTP/1.1", HOST, LENGTH),
        ("POST /v2/models/zoo/versions/\xb2/infer HTTP/1.1", HOST, LENGTH),
        ("POST /v1/classify? HTTP/1.1", HOST, LENGTH),
        ("POST /v1/classify?top HTTP/1.1", HOST, LENGTH),
        ("POST /v1/classify?top= HTTP/1.1", HOST, LENGTH),
        ("POST /v1/classify?top=1&top=2 HTTP/1.1", HOST, LENGTH),
        ("POST /v1/classify?top=1& HTTP/1.1", HOST, LENGTH),
        ("POST /v1/classify?top=1=2 HTTP/1.1", HOST, LENGTH),
        ("POST /v1/classify?top=%31 HTTP/1.1", HOST, LENGTH),
        ("POST /v1/classify?page=1 HTTP/1.1", HOST, LENGTH),
    ],
    ids=lambda lines: " | ".join(lines)[-60:],
)  # fmt: skip
def test_any_other_head_is_left_to_the_parser(lines: tuple[str, ...]) -> None:
    assert read_head(head(*lines)) is None
    assert PlainHeads().read(head(*lines)) is None


class Parsed:
    """What httptools makes of a request."""

    def __init__(self) -> None:
        self.url, self.body, self.complete = b"", b"", 0
        self.fields: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete += 1


def require_same_reading(raw: bytes, found: PlainHead) -> None:
    """The parser ends the request at the same byte, with the same path, query and fields."""
    seen = Parsed()
    parser = httptools.HttpRequestParser(seen)
    body = b"x" * found.length
    parser.feed_data(raw + body[:-1])
    assert seen.complete == 0
    parser.feed_data(body[-1:])
    assert (seen.complete, seen.body, parser.get_method(), parser.get_http_version()) == (1, body, b"POST", "1.1")
    assert parser.should_keep_alive()
    assert not parser.should_upgrade()
    assert seen.fields == list(found.fields.items())
    url = httptools.parse_url(seen.url)
    assert url.path.decode() == found.path
    query = "&".join(f"{name}={value}" for name, value in found.query.items())
    assert (url.query or b"").decode() == query


def test_the_parser_reads_every_head_that_is_plain_in_the_same_way() -> None:
    rng = random.Random(4)
    base = [
        head(INFER, HOST, LENGTH, "Inference-Header-Content-Length: 7", "Connection: keep-alive"),
        head("POST /v1/classify?top=3&model=zoo HTTP/1.1", "Host:a", "User-Agent: x: y", "Content-Length: 4"),
        head("POST /v2/models/a/versions/1/infer HTTP/1.1", HOST, LENGTH, "X-Request-ID: a", "Accept: */*"),
    ]
    pieces = [
        *(bytes([value]) for value in range(256)), b"\r\n", b"\r", b"\n", b"\r\n ", b": ", b"chunked", b"%20", b"//",
        b"?", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: b\r\n", b"X-Real-IP: 1\r\n",
        b"Via: x\r\n", b"&top=2",
    ]  # fmt: skip
    plain = 0
    for _ in range(30_000):
        raw = bytearray(rng.choice(base))
        for _ in range(rng.choice((1, 1, 2, 3))):
            at = rng.randrange(len(raw))
            until = at + rng.choice((0, 0, 1, 2))
            raw[at:until] = rng.choice(pieces) if rng.random() < 0.4 else rng.choice(string.printable).encode()
        found = PlainHeads().read(bytes(raw))
        if found is not None:
            require_same_reading(bytes(raw[: found.size]), found)
            plain += 1
    # The comparison is of many different heads.
    assert plain > 800


def test_a_head_is_complete_and_short_and_only_a_bounded_number_is_remembered() -> None:
    heads = PlainHeads()
    raw = head(INFER, HOST, LENGTH)
    for end in range(len(raw)):
        assert heads.read(raw[:end]) is None
    first = heads.read(raw + b"body")
    assert first is not None
    assert heads.read(raw + b"other") is first
    assert heads.read(head(INFER, HOST, LENGTH, "User-Agent: " + "x" * 5000)) is None
    for number in range(1000):
        assert heads.read(head(INFER, HOST, LENGTH, f"X-Request-ID: {number}")) is not None
    assert len(heads._known) <= 256
