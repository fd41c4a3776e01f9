"""Recognise plain requests for a model: heads of which every byte is understood, and short bodies of a given length.

This is a second reader of HTTP beside the parser of the server, so it takes only what no two readers can understand
differently: HTTP/1.1, one request line, one field a line, names that are known to have no other effect, and none twice.
Any other head is left to the parser.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kdexport.errors import RequestError
from kdexport.serving.endpoints import read_header_length
from kdexport.serving.requests import INLINE_BYTES
from kdexport.serving.wire import HEADER_LENGTH

#: A longer head is not plain.
_MAX_HEAD = 4096
#: Heads that are remembered; a client sends the same one with each request.
_MAX_KNOWN = 256
_START = b"POST /v"
_END = b"\r\n\r\n"
_HEAD = re.compile(
    rb"POST (?P<path>/v2/models/(?P<model>[\w.-]+)(?:/versions/(?P<version>\d+))?/infer|/v1/classify)"
    rb"(?:(?<=classify)\?(?P<query>[\w.=&-]+))? HTTP/1\.1\r\n"
    rb"(?P<fields>(?:[A-Za-z0-9-]+: ?[!-~](?:[ -~]*[!-~])?\r\n)+)\r\n"
)
_LENGTH = re.compile(rb"[1-9]\d{0,5}")
_QUERY = frozenset({"top", "model", "version"})
#: Fields that are read here, or in the identity of the request, or have no effect on the server. Notably absent are
#: Transfer-Encoding, Content-Encoding, Expect, Upgrade, TE, Origin and everything that is unknown.
_FIELDS = frozenset(
    {
        b"accept", b"accept-encoding", b"accept-language", b"authorization", b"cache-control", b"connection",
        b"content-length", b"content-type", b"forwarded", b"host", HEADER_LENGTH.encode(), b"keep-alive", b"pragma",
        b"traceparent", b"tracestate", b"user-agent", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-port",
        b"x-forwarded-proto", b"x-real-ip", b"x-request-id",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainHead:
    """A head of ``size`` bytes, before a body of ``length``; ``model`` is that of the path, None for an image.

    The names in ``fields`` are lower-case.
    """

    size: int
    length: int
    path: str
    model: str | None
    version: str | None
    query: Mapping[str, str]
    fields: Mapping[bytes, bytes]
    header_length: int | None
    authorization: str


def read_head(raw: bytes) -> PlainHead | None:
    """The head ``raw``, up to and with its empty line; None unless it is plain."""
    match = _HEAD.fullmatch(raw)
    if match is None:
        return None
    fields: dict[bytes, bytes] = {}
    for line in match["fields"].splitlines():
        name, _, value = line.partition(b":")
        name = name.lower()
        if name not in _FIELDS or name in fields:
            return None
        fields[name] = value.strip()
    query = _read_query((match["query"] or b"").decode())
    length = fields.get(b"content-length", b"")
    if query is None or b"host" not in fields or not _LENGTH.fullmatch(length) or int(length) > INLINE_BYTES:
        return None
    if fields.get(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    # A form holds its image among other parts.
    if fields.get(b"content-type", b"").lower().startswith(b"multipart/"):
        return None
    given = fields.get(HEADER_LENGTH.encode())
    try:
        header_length = read_header_length(None if given is None else given.decode())
    except RequestError:
        return None
    return PlainHead(
        size=len(raw), length=int(length), path=match["path"].decode(),
        model=None if match["model"] is None else match["model"].decode(),
        version=None if match["version"] is None else match["version"].decode(),
        query=query, fields=MappingProxyType(fields), header_length=header_length,
        authorization=fields.get(b"authorization", b"").decode(),
    )  # fmt: skip


def _read_query(text: str) -> Mapping[str, str] | None:
    """The parameters of a query of known names, each once and with a value; None for any other."""
    pairs = [part.partition("=") for part in text.split("&")] if text else []
    found = {name: value for name, _, value in pairs}
    if (
        len(found) != len(pairs)
        or not found.keys() <= _QUERY
        or not all(found.values())
        or "=" in "".join(found.values())
    ):
        return None
    return MappingProxyType(found)


class PlainHeads:
    """Reads heads, and remembers a bounded number of plain ones by their bytes."""

    def __init__(self) -> None:
        self._known: dict[bytes, PlainHead] = {}

    def read(self, data: bytes) -> PlainHead | None:
        """The head at the start of ``data``; None unless it is complete and plain."""
        end = data.find(_END, 0, _MAX_HEAD) if data.startswith(_START) else -1
        if end < 0:
            return None
        raw = data[: end + len(_END)]
        known = self._known.get(raw)
        if known is not None:
            return known
        head = read_head(raw)
        if head is not None:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[raw] = head
        return head
