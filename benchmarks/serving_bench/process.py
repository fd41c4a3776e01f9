"""A server as a child process: started by a command line, measured through /proc, and ended with its session."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Command:
    """The command line of a server, with ``{port}`` for its port; it is ready when the path ``ready`` answers 200."""

    name: str
    arguments: tuple[str, ...]
    ready: str
    environment: dict[str, str]
    folder: Path


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory and its peak in MB, and open file descriptors, of the server and its children."""

    rss_mb: float
    peak_mb: float
    descriptors: int


class Server:
    """A running server on a loopback port."""

    def __init__(self, command: Command, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.command, self.process, self.port, self.log = command, process, port, log

    @property
    def pid(self) -> int:
        """The id of the process that was started."""
        return self.process.pid

    def session(self) -> list[int]:
        """Ids of the processes in the server's session: itself and its children."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                if int(entry.read_text().rpartition(")")[2].split()[3]) == self.pid:
                    found.append(int(entry.parent.name))
        return found

    def cpu_seconds(self) -> float:
        """User and system time that the session has used so far."""
        total = 0
        for pid in self.session():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        return total / _TICK

    def memory(self) -> Memory:
        """Memory and descriptors of the session."""
        rss = peak = descriptors = 0
        for pid in self.session():
            with contextlib.suppress(OSError):
                status = dict(
                    line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
                )
                rss += int(status["VmRSS"].split()[0])
                peak += int(status["VmHWM"].split()[0])
                descriptors += len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return Memory(rss / 1024, peak / 1024, descriptors)

    def answers(self, path: str, timeout_s: float = 2.0) -> bool:
        """Whether GET ``path`` gives 200 in time, on a new connection."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout_s) as reply:
                return bool(reply.status == 200)
        except (OSError, urllib.error.URLError, ValueError):
            return False


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: Command, log: Path, *, descriptors: int | None = None) -> Iterator[Server]:
    """Start a server and wait until it is ready; at the end SIGTERM, then SIGKILL for the rest of its session."""
    port = free_port()

    def limit() -> None:
        if descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    with log.open("ab") as stream:
        process = subprocess.Popen(
            [argument.replace("{port}", str(port)) for argument in command.arguments],
            stdout=stream, stderr=stream, cwd=command.folder, env={**os.environ, **command.environment},
            start_new_session=True, preexec_fn=limit,
        )  # fmt: skip
    server = Server(command, process, port, log)
    try:
        _await_ready(server)
        yield server
    finally:
        stop(server)


def _await_ready(server: Server, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not server.answers(server.command.ready):
        if server.process.poll() is not None or time.monotonic() > deadline:
            tail = server.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{server.command.name} did not become ready: {tail}")
        time.sleep(0.1)


def stop(server: Server, grace_s: float = 30.0) -> float:
    """End a server; returns the seconds until it ended."""
    started = time.monotonic()
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(grace_s)
    # The session is the server's own: start_new_session made its process the leader.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.process.wait()
    return time.monotonic() - started
