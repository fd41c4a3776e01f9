"""Closed-loop load from wrk, which takes little of the cores that it shares with the server."""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from serving_bench.payloads import Payload
from serving_bench.process import Server

_SCRIPT = """
local file = io.open("{body}", "rb")
wrk.method = "POST"
wrk.path = "{path}"
wrk.body = file:read("*a")
file:close()
{headers}
{backoff}
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\nRESULT {{"requests": %d, "seconds": %.6f, "p50_ms": %.4f, "p90_ms": %.4f, "p99_ms": %.4f, "max_ms": %.4f, ' ..
    '"connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(90) / 1e3,
    latency:percentile(99) / 1e3, latency.max / 1e3, e.connect, e.read, e.write, e.status, e.timeout))
end
"""
# wrk calls delay() before each request of any connection, so there are as many pauses as refusals.
_BACKOFF = """
local refused = 0
function response(status) if status == 429 or status == 503 then refused = refused + 1 end end
function delay() if refused > 0 then refused = refused - 1; return {ms} end; return 0 end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """The result of one run: responses 2xx and 3xx (``ok``), other responses (``refused``), none (``broken``)."""

    clients: int
    seconds: float
    ok: int
    refused: int
    broken: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    cpu_ms: float

    @property
    def rate(self) -> float:
        """Successful responses per second."""
        return self.ok / self.seconds


def require_wrk() -> str:
    """The path of wrk; raises ``RuntimeError`` if it is not installed."""
    found = shutil.which("wrk")
    if found is None:
        raise RuntimeError("wrk is not installed. On Debian: apt-get install wrk")
    return found


def load(server: Server, payload: Payload, *, clients: int, seconds: float, backoff_ms: int | None = None) -> Load:
    """Load from ``clients`` connections, each of which sends its next request after the response to the last."""
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder) / "body", Path(folder) / "load.lua"
        body.write_bytes(payload.body)
        headers = "\n".join(f"wrk.headers[{json.dumps(k)}] = {json.dumps(v)}" for k, v in payload.headers.items())
        backoff = "" if backoff_ms is None else _BACKOFF.format(ms=backoff_ms)
        script.write_text(_SCRIPT.format(body=body, path=payload.path, headers=headers, backoff=backoff))
        before = server.cpu_seconds()
        done = subprocess.run(
            [require_wrk(), "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", "-s",
             str(script), f"http://127.0.0.1:{server.port}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        cpu = server.cpu_seconds() - before
    result = json.loads(done.stdout.rpartition("RESULT ")[2])
    ok = result["requests"] - result["status"]
    return Load(
        clients=clients,
        seconds=result["seconds"],
        ok=ok,
        refused=result["status"],
        broken=result["connect"] + result["read"] + result["write"] + result["timeout"],
        p50_ms=result["p50_ms"],
        p90_ms=result["p90_ms"],
        p99_ms=result["p99_ms"],
        cpu_ms=1000 * cpu / max(ok, 1),
    )
