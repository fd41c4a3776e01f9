"""An address is announced only if this process listens on it and answers there."""

import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kdexport.errors import ConfigError, ServerError
from kdexport.serving.listening import (
    Address,
    Sockets,
    authority,
    bind,
    bind_all,
    drop_new_connections,
    is_loopback,
    listen,
    require_own_answer,
)
from tests.kdexport.serving.running_server import Running


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def other_process(answer: bytes, status: int = 200) -> Iterator[int]:
    """The port of an HTTP server that answers every request with ``answer``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def test_the_second_of_two_bound_sockets_may_not_listen() -> None:
    first = bind_all(Address(port=0, metrics_port=0))
    port = int(first.requests.getsockname()[1])
    taken = bind("127.0.0.1", port)
    with first.requests, first.metrics, taken, bind("127.0.0.1", 0) as free:
        listen(first, Address())
        with pytest.raises(ServerError) as requests:
            listen(Sockets(requests=taken, metrics=free), Address())
        assert requests.value.message == f"Cannot listen on 127.0.0.1:{port}: Address already in use."
        assert requests.value.remedy == "Choose another --host or --port."
    with bind("127.0.0.1", 0) as free, socket.create_server(("127.0.0.1", 0)) as other:
        port = int(other.getsockname()[1])
        with pytest.raises(ServerError) as metrics:
            bind_all(Address(port=0, metrics_port=port))
        assert metrics.value.remedy == "Choose another --metrics-host or --metrics-port."


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has filters of sockets")
def test_before_the_port_is_closed_no_connection_is_established_any_more() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as early,
        socket.socket() as late,
    ):
        assert drop_new_connections(listener)
        late.settimeout(0.3)
        with pytest.raises(TimeoutError):
            late.connect(listener.getsockname())
        early.sendall(b"request")
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(7) == b"request"


def test_one_port_for_requests_and_metrics_is_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        bind_all(Address(port=8123, metrics_port=8123))
    assert "--port and --metrics-port are both 8123" in raised.value.message


@pytest.mark.parametrize(("answer", "status"), [(b'{"live": true, "id": "theirs"}', 200), (b"ours", 404)])
def test_an_answer_of_another_process_or_a_404_is_an_error(answer: bytes, status: int) -> None:
    with other_process(answer, status) as port, pytest.raises(ServerError) as raised:
        require_own_answer("127.0.0.1", port, "/v2/health/live", "ours", options="--port")
    assert raised.value.message == f"A request to 127.0.0.1:{port} was answered by another process than this server."
    with other_process(b'{"id": "ours"}') as port:
        require_own_answer("127.0.0.1", port, "/v2/health/live", "ours", options="--port")


def test_no_answer_is_an_error() -> None:
    with pytest.raises(ServerError, match="was not answered"):
        require_own_answer("127.0.0.1", free_port(), "/metrics", "ours", options="--metrics-port")


@pytest.mark.parametrize(
    ("host", "written", "loopback"),
    [
        ("127.0.0.1", "127.0.0.1:80", True),
        ("127.9.9.9", "127.9.9.9:80", True),
        ("::1", "[::1]:80", True),
        ("[::1]", "[::1]:80", True),
        ("::", "[::]:80", False),
        ("0.0.0.0", "0.0.0.0:80", False),
        ("localhost", "localhost:80", True),
        ("server.example", "server.example:80", False),
    ],
)
def test_hosts_are_written_as_in_urls(host: str, written: str, loopback: bool) -> None:
    assert authority(host, 80) == written
    assert is_loopback(host) is loopback


def test_probes_and_metrics_identify_the_process(server: Running) -> None:
    identity = server.ask("GET", "/v2/health/live").data["id"]
    assert server.metric("kdexport_server", id=identity) == 1


def test_of_two_servers_started_together_only_one_is_announced(zoo: Path) -> None:
    port = str(free_port())
    command = [sys.executable, "-m", "kdexport", "serve", f"zoo={zoo}", "--port", port, "--metrics-port", "0", "--json"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in "ab"]
    try:
        answers = [json.loads(process.stdout.readline()) for process in started if process.stdout is not None]
        assert sorted((answer["ok"], answer["exit_code"]) for answer in answers) == [(False, 4), (True, 0)]
    finally:
        for process in started:
            process.kill()
            process.communicate()
