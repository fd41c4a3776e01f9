"""The addresses of the server: bound and listening sockets, and the proof that requests to them reach this process."""

import ctypes
import http.client
import ipaddress
import socket
import ssl
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kdexport.errors import ConfigError, ServerError

BACKLOG = 2048
LOOPBACK = "127.0.0.1"
#: Of Linux; Python's socket module does not name it.
_SO_ATTACH_FILTER = 26
_ANSWER_SECONDS = 10.0
_ALL_ANSWER_SECONDS = 20.0
#: Nothing can connect to a wildcard address by that name on every system; its own machine can by the loopback address.
_WILDCARDS = {"0.0.0.0": LOOPBACK, "::": "::1", "": LOOPBACK}  # noqa: S104
_OPTIONS = "--host or --port"
METRICS_OPTIONS = "--metrics-host or --metrics-port"


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """The hosts and ports to listen on; port 0 means any free port."""

    host: str = LOOPBACK
    port: int = 8000
    metrics_host: str = LOOPBACK
    metrics_port: int = 8002


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """The ports of a running server."""

    port: int
    metrics_port: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sockets:
    """The bound sockets of the requests and of the metrics."""

    requests: socket.socket
    metrics: socket.socket

    @property
    def ports(self) -> Ports:
        """Their ports."""
        port, metrics_port = (int(bound.getsockname()[1]) for bound in (self.requests, self.metrics))
        return Ports(port=port, metrics_port=metrics_port)


def bind_all(address: Address) -> Sockets:
    """Bind both addresses; raises ``ConfigError`` if their ports are equal, ``ServerError`` if one is not free."""
    if address.port == address.metrics_port != 0:
        raise ConfigError(
            f"--port and --metrics-port are both {address.port}; requests and metrics need different ports.",
            remedy="Choose another --metrics-port, or 0 for any free port.",
        )
    requests = bind(address.host, address.port, options=_OPTIONS)
    try:
        return Sockets(
            requests=requests, metrics=bind(address.metrics_host, address.metrics_port, options=METRICS_OPTIONS)
        )
    except ServerError:
        requests.close()
        raise


def bind(host: str, port: int, *, options: str = _OPTIONS) -> socket.socket:
    """A socket bound to this address, not listening yet.

    Raises ``ServerError``, whose remedy names ``options``, if the address is taken or not of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            without_brackets(host), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise _cannot_listen(host, port, options, error) from error
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, options, error) from error
    bound.setblocking(False)
    return bound


def listen(sockets: Sockets, address: Address) -> None:
    """Let both sockets listen; raises ``ServerError`` if another process listens on one of their addresses.

    Two sockets can be bound to one address as long as neither listens, and uvloop does not report that listening
    failed.
    """
    for bound, host, options in (
        (sockets.requests, address.host, _OPTIONS),
        (sockets.metrics, address.metrics_host, METRICS_OPTIONS),
    ):
        try:
            bound.listen(BACKLOG)
        except OSError as error:
            raise _cannot_listen(host, int(bound.getsockname()[1]), options, error) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The family and address of a bound socket, to which others can be bound."""

    family: socket.AddressFamily
    address: Any

    @classmethod
    def of(cls, bound: socket.socket) -> "Place":
        """The place of this socket."""
        return cls(family=bound.family, address=bound.getsockname())

    def bind(self, *, shared: bool) -> socket.socket:
        """Another socket bound to it, not listening yet; ``shared`` after ``listen_together``, else before a socket
        listens there. Raises ``OSError``.
        """
        other = socket.socket(self.family, socket.SOCK_STREAM)
        try:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            other.bind(self.address)
        except OSError:
            other.close()
            raise
        other.setblocking(False)
        return other


def listen_together(listening: socket.socket, others: Iterable[socket.socket]) -> None:
    """Let ``others``, bound to the address of ``listening``, listen there too: the kernel deals connections out.

    The first one must have begun to listen without ``SO_REUSEPORT``: then nobody else listened there before.
    """
    for each in (listening, *others):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    for other in others:
        other.listen(BACKLOG)


def drop_new_connections(listening: socket.socket) -> bool:
    """Let the kernel drop the first packet of every new connection; those that exist stay. Returns whether it does.

    The client sends that packet again after a second, and finds the port closed. Only Linux has such filters.
    """
    if not sys.platform.startswith("linux"):
        return False
    # The filter sees the TCP header: (code, true, false, k) loads byte 13, the flags, and tests SYN.
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
    )
    buffer = ctypes.create_string_buffer(program, len(program))
    try:
        listening.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
        )
    except OSError:
        return False
    return True


def _cannot_listen(host: str, port: int, options: str, error: OSError) -> ServerError:
    return ServerError(
        f"Cannot listen on {authority(host, port)}: {error.strerror or error}.", remedy=f"Choose another {options}."
    )


def without_brackets(host: str) -> str:
    """``host`` without the brackets that URLs put around IPv6 addresses."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def authority(host: str, port: int) -> str:
    """``host:port`` as in a URL: IPv6 addresses in brackets."""
    bare = without_brackets(host)
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to ``host``."""
    bare = without_brackets(host)
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return bare == "localhost"


def require_own_answer(
    host: str, port: int, path: str, identity: str, *, options: str, context: ssl.SSLContext | None = None
) -> None:
    """Send ``GET path`` to an address before it is announced, and find the ``identity`` of this process in the answer.

    ``context`` is that of the server's TLS, None without. Blocking; raises ``ServerError``.
    """
    bare = without_brackets(host)
    where = authority(host, port)
    try:
        answer = _get(_WILDCARDS.get(bare, bare), port, path, secure=context is not None)
    except (OSError, http.client.HTTPException) as error:
        raise _no_answer(where, options, error) from error
    if identity.encode() not in answer:
        raise _other_process(where, options)


def _other_process(where: str, options: str) -> ServerError:
    return ServerError(
        f"A request to {where} was answered by another process than this server.",
        remedy=f"Stop the other process, or choose another {options}.",
    )


def require_all_answer(
    address: Address, port: int, identities: Sequence[str], context: ssl.SSLContext | None = None
) -> None:
    """Send requests until each of the processes that share ``port`` has answered one. Blocking.

    Raises ``ServerError`` if one does not answer in time, or another process does.
    """
    missing, until = set(identities), time.monotonic() + _ALL_ANSWER_SECONDS
    bare = without_brackets(address.host)
    host, where = _WILDCARDS.get(bare, bare), authority(address.host, port)
    while missing and time.monotonic() < until:
        try:
            answer = _get(host, port, "/v2/health/live", secure=context is not None).decode()
        except (OSError, http.client.HTTPException) as error:
            raise _no_answer(where, _OPTIONS, error) from error
        if not any(identity in answer for identity in identities):
            raise _other_process(where, _OPTIONS)
        missing = {identity for identity in missing if identity not in answer}
    if missing:
        raise ServerError(
            f"{len(missing)} of the {len(identities)} processes that share {where} answered no request within "
            f"{_ALL_ANSWER_SECONDS:g} s.",
            remedy="Start the server again, or with --instances 1.",
        )


def _no_answer(where: str, options: str, error: Exception) -> ServerError:
    return ServerError(
        f"The server listens on {where}, but a request to it was not answered ({type(error).__name__}).",
        remedy=f"Check the firewall of this machine, or choose another {options}.",
    )


def require_own_answers(
    address: Address, sockets: Sockets, identity: str, context: ssl.SSLContext | None = None
) -> None:
    """Check the address of the requests and that of the metrics; see ``require_own_answer``."""
    port, metrics_port = sockets.ports.port, sockets.ports.metrics_port
    require_own_answer(address.host, port, "/v2/health/live", identity, options=_OPTIONS, context=context)
    require_own_answer(address.metrics_host, metrics_port, "/metrics", identity, options=METRICS_OPTIONS)


def _get(host: str, port: int, path: str, *, secure: bool) -> bytes:
    if secure:
        # The certificate names the host that clients use; that this process answers is what the identity shows.
        unchecked = ssl.create_default_context()
        unchecked.check_hostname = False
        unchecked.verify_mode = ssl.CERT_NONE
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=_ANSWER_SECONDS, context=unchecked
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_SECONDS)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        return response.read() if response.status == http.HTTPStatus.OK else b""
    finally:
        connection.close()
