"""What lies around the server's application: identities, the access log, origins of pages, and traces."""

import http.server
import json
import queue
import re
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdexport.errors import BackendUnavailableError, ConfigError
from kdexport.serving import tracing
from kdexport.serving.access_log import AccessLog, require_separate
from kdexport.serving.cross_origin import allow_origins, require_origins
from kdexport.serving.request_identity import RequestIdentity, identity_of
from tests.kdexport.serving.event_loop import run
from tests.kdexport.serving.running_server import Running, call, running

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
TOKEN = "a-token-of-32-characters-or-more"


@dataclass(frozen=True)
class Watched:
    """A server with everything around it, its access log, and what its traces were sent to."""

    server: Running
    log: Path
    spans: "queue.Queue[bytes]"

    def lines(self, count: int, **wanted: object) -> list[dict[str, Any]]:
        """The first ``count`` lines with these values; the log is written soon, not at once."""
        for _ in range(200):
            lines = [json.loads(line) for line in self.log.read_text().splitlines()]
            found = [line for line in lines if all(line[key] == value for key, value in wanted.items())]
            if len(found) >= count:
                return found
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())


@pytest.fixture(scope="module")
def watched(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    spans: queue.Queue[bytes] = queue.Queue()

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            spans.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    folder = tmp_path_factory.mktemp("watched")
    (folder / "token").write_text(TOKEN)
    options: list[str | Path] = [
        "--access-log", folder / "access.jsonl", "--cors", "https://app.example.com", "--otel",
        "--token-file", folder / "token", "--instances", "1", "--drain", "0.1",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with running(f"zoo={zoo}", *options) as server:
            yield Watched(server, folder / "access.jsonl", spans)
    collector.shutdown()
    collector.server_close()


def test_a_request_keeps_its_identity_in_response_log_and_trace(watched: Watched) -> None:
    headers = {
        "X-Request-ID": "order-17/b",
        "traceparent": PARENT,
        "User-Agent": "t" * 300,
        "Authorization": f"Bearer {TOKEN}",
    }
    answer = watched.server.ask("GET", "/v2/models/zoo?secret=1", headers=headers)
    assert answer.status == 200
    assert answer.headers["x-request-id"] == "order-17/b"
    (line,) = watched.lines(1, request_id="order-17/b")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert 0 < line.pop("ms") < 60_000
    assert line == {
        "request_id": "order-17/b", "trace_id": TRACE, "client": "127.0.0.1", "method": "GET", "path": "/v2/models/zoo",
        "status": 200, "response_bytes": len(answer.body), "user_agent": "t" * 200,
    }  # fmt: skip
    assert TOKEN not in watched.log.read_text()
    sent = b""
    while bytes.fromhex(TRACE) not in sent:
        sent += watched.spans.get(timeout=30)
    assert b"kdexport" in sent


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", "caf\u00e9", '"quoted"'])
def test_an_identity_that_a_log_cannot_hold_is_replaced(watched: Watched, given: str) -> None:
    answer = watched.server.ask("GET", "/v2/health/live", headers={"X-Request-ID": given})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    assert watched.lines(1, request_id=answer.headers["x-request-id"])[0]["path"] == "/v2/health/live"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2/models/zoo", 401), ("GET", "/none\u2028", 401), ("POST", "/v1/classify", 401)],
)
def test_refused_requests_have_an_identity_and_a_line(watched: Watched, method: str, path: str, status: int) -> None:
    answer = watched.server.ask(method, path.replace("\u2028", "%E2%80%A8"), b"x" if method == "POST" else None)
    assert answer.status == status
    (line,) = watched.lines(1, request_id=answer.headers["x-request-id"])
    assert (line["path"], line["status"], line["trace_id"]) == (path, status, None)


def test_a_page_of_a_named_origin_may_ask_first_without_the_token_and_no_other_page(watched: Watched) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = watched.server.ask("OPTIONS", "/v1/classify", headers={"Origin": "https://app.example.com", **asked})
    assert allowed.status == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example.com"
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in allowed.headers
    other = watched.server.ask("OPTIONS", "/v1/classify", headers={"Origin": "https://evil.example.com", **asked})
    assert other.status == 400
    assert "access-control-allow-origin" not in other.headers
    # The page can read the error of a request without a token, and what was echoed.
    refused = watched.server.ask("GET", "/v2", headers={"Origin": "https://app.example.com"})
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, "https://app.example.com")
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
    plain = watched.server.ask("GET", "/v2", headers={"Origin": "https://evil.example.com"})
    assert "access-control-allow-origin" not in plain.headers


@pytest.mark.parametrize(
    "origin", ["app.example.com", "https://a.example/", "https://a.example/x", "null", "https://*.a.b", ""]
)
def test_what_no_browser_sends_as_an_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="is not an origin"):
        require_origins([origin])


def test_origins_of_every_form_are_accepted() -> None:
    require_origins(["https://app.example.com", "http://localhost:3000", "http://[::1]:8080", "*"])
    app = object()
    assert allow_origins(app, []) is app  # type: ignore[arg-type]


def test_a_failure_of_the_application_is_logged_as_500(tmp_path: Path) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("a secret")

    log = AccessLog(str(tmp_path / "log"))
    with pytest.raises(ValueError, match="secret"):
        run(call(RequestIdentity(broken, log), "GET", "/x"))
    log.close()
    (line,) = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert (line["status"], line["response_bytes"]) == (500, 0)
    assert "secret" not in json.dumps(line)


def test_every_response_has_the_identity_even_if_the_application_names_another() -> None:
    async def answering(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": [(b"x-request-id", b"other")]})
        await send({"type": "http.response.body", "body": b""})

    answer = run(call(RequestIdentity(answering), "GET", "/x", headers={"x-request-id": "mine"}))
    assert answer.headers["x-request-id"] == "mine"


def test_a_log_that_is_rotated_is_created_again_and_one_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "log"))
    log.write({"n": 1})
    for _ in range(200):
        if (tmp_path / "log").read_text():
            break
        time.sleep(0.02)
    (tmp_path / "log").rename(tmp_path / "old")
    log.write({"n": 2})
    log.close()
    assert [json.loads((tmp_path / name).read_text())["n"] for name in ("old", "log")] == [1, 2]
    with pytest.raises(ConfigError, match="cannot be written"):
        AccessLog(str(tmp_path / "none" / "log"))
    with pytest.raises(ConfigError, match="--json"):
        require_separate("-", as_json=True)
    require_separate("-", as_json=False)


def test_a_log_that_nobody_reads_drops_lines_and_holds_up_no_request(tmp_path: Path) -> None:
    import os

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    dropped: list[int] = []
    log = AccessLog(str(pipe), lambda: dropped.append(1))
    began = time.monotonic()
    for number in range(12_000):
        log.write({"n": number, "padding": "x" * 80})
    assert time.monotonic() - began < 20
    assert dropped
    os.set_blocking(reader, True)
    thread = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reader, 65536), b"")], daemon=True)
    thread.start()
    log.close()
    thread.join(30)
    os.close(reader)


def test_traces_without_opentelemetry_are_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing.require_tracing()
    monkeypatch.setattr(tracing, "_PACKAGES", ("opentelemetry_is_not_here.sdk",))
    with pytest.raises(BackendUnavailableError) as refused:
        tracing.require_tracing()
    assert "kdexport[otel]" in refused.value.remedy


def test_identities_are_made_of_random_bytes_and_differ_in_all_threads() -> None:
    found: list[list[str]] = [[] for _ in range(4)]

    def make(mine: list[str]) -> None:
        mine += [identity_of({}) for _ in range(3000)]

    threads = [threading.Thread(target=make, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [identity for mine in found for identity in mine]
    assert len(set(made)) == len(made) == 12_000
    assert all(re.fullmatch("[0-9a-f]{32}", identity) for identity in made)
    # Every digit of a place is as likely as any other: none is fixed.
    assert all(len({identity[place] for identity in made}) == 16 for place in range(32))
