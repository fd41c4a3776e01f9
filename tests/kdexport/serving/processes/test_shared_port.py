"""Servers of two processes that share a port, as users start and stop them."""

import contextlib
import os
import shutil
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from kdexport.serving.limits import usable_processors
from tests.kdexport.serving.loaded_server import BODY, HEADERS, rewritten, swap, under_load, wait_for
from tests.kdexport.serving.running_server import Running, command, running

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or usable_processors() < 2, reason="two processes need two processors, and Linux"
)

#: That none of so many new connections reaches one of two processes has a chance of 1 in 16 million.
CONNECTIONS = 24


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_counts_reloads_and_tokens_are_those_of_one_server_and_no_request_is_lost_at_its_end(
    zoo: Path, zoo_copy: Path, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    options = ("--instances", "2", "--token-file", token, "--watch", "0", "--drain", "0.3")
    with running(f"zoo={zoo_copy}", *options) as server:
        assert (server.announced["instances"], server.announced["processes"]) == (2, 2)
        assert len(children(server.process.pid)) == 2
        bearer = {"Authorization": "Bearer 0123456789abcdef"}
        identities = {server.ask("GET", "/v2/health/live").data["id"] for _ in range(CONNECTIONS)}
        assert len(identities) == 2
        for _ in range(CONNECTIONS):
            assert server.ask("POST", "/v2/models/zoo/infer", BODY, {**HEADERS, **bearer}).status == 200
        assert server.metric("nv_inference_request_success", model="zoo") == CONNECTIONS
        assert server.metric("kdexport_server") == 3
        (row,) = server.ask("GET", "/v2/models/stats", None, bearer).data["model_stats"]
        assert row["inference_count"] == row["inference_stats"]["success"]["count"] == CONNECTIONS
        (group,) = server.ask("GET", "/v2/models/zoo/config", None, bearer).data["instance_group"]
        assert group["count"] == 2
        # Everything changes in both processes.
        token.write_text("fedcba9876543210\n")
        fresh = Path(shutil.copytree(zoo, tmp_path / "fresh"))
        digest = rewritten(fresh)
        swap(fresh, zoo_copy)
        server.process.send_signal(signal.SIGHUP)
        renewed = {"Authorization": "Bearer fedcba9876543210"}
        path = "/v2/models/zoo"

        def is_fresh() -> bool:
            answer = server.ask("GET", path, None, renewed)
            return answer.status == 200 and answer.data["parameters"]["bundle_sha256"] == digest

        wait_for(lambda: all(is_fresh() for _ in range(CONNECTIONS)))
        assert {server.ask("GET", path, None, bearer).status for _ in range(CONNECTIONS)} == {401}
        # Nobody reads the token of the command line of a process.
        shown = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children(server.process.pid)]
        assert all(str(token) in line and "fedcba" not in line and "012345" not in line for line in shown)
        token.write_text("0123456789abcdef\n")
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: server.ask("GET", path, None, bearer).status == 200)
        with under_load(server) as load:
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=60) == 0
        assert load.broken == []
        assert load.answered > 20
        assert "stopped; 0 requests got no response" in server.log.read_text()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_is_renewed_in_all_and_a_killed_process_is_named_and_started_again(
    zoo: Path, tmp_path: Path
) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    request = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {cert}"
    subprocess.run(request.split(), check=True, capture_output=True)
    options = ("--instances", "2", "--tls-cert", cert, "--tls-key", key, "--watch", "0", "--drain", "0")
    with running(f"zoo={zoo}", *options) as server:

        def shown() -> str:
            return ssl.get_server_certificate(("127.0.0.1", server.port))

        old = shown()
        subprocess.run(request.split(), check=True, capture_output=True)
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: old not in {shown() for _ in range(CONNECTIONS)})
        first, second = children(server.process.pid)
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: server.metric("kdexport_processes") == 1)
        assert shown() != old
        wait_for(lambda: server.metric("kdexport_processes") == 2)
        assert server.metric("kdexport_process_restarts_total") == 1
        assert "Process 1 was ended by SIGKILL; it is started again." in server.log.read_text()
        again = children(server.process.pid)
        assert second in again
        assert first not in again
        # Without a supervisor no process is left behind.
        server.process.kill()
        server.process.wait()
        wait_for(lambda: not any(is_running(pid) for pid in again))


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_errors_of_the_start_are_those_of_one_process(server: Running, zoo: Path, tmp_path: Path) -> None:
    arguments = [*command("nowhere"), "--instances", "2"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300)
    assert done.returncode == 2
    assert "error KDX203: nowhere is neither a bundle nor a folder of bundles named 1, 2, 3" in done.stderr
    arguments = [*command(zoo), "--instances", "2", "--port", str(server.port)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 4
    assert f"Cannot listen on 127.0.0.1:{server.port}: Address already in use.\n" in done.stderr
    assert "Traceback" not in done.stderr
