"""Sessions from the outside: which processors they are held on, how they are started, and what became of them."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from kdexport.errors import ForwardedError, VerificationError
from kdexport.gate.session import Request, Session

SESSION_TIMEOUT_S = 600


def usable_cpus() -> tuple[int, ...]:
    """Processors that this process may run on."""
    return tuple(sorted(os.sched_getaffinity(0)))


def pinned_cpus(threads: int) -> tuple[int, ...]:
    """The processors that sessions of ``threads`` threads are held on: the last ones, for interrupts meet the first."""
    return usable_cpus()[-threads:]


def run_session(request: Request) -> Session:
    """Run one session in a fresh process; raises what it raised, or ``VerificationError`` if it died or hung."""
    command = [sys.executable, "-m", "kdexport.gate.session", json.dumps(asdict(request))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SESSION_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise VerificationError(
            f"A latency session did not end within {error.timeout:g} s.",
            remedy="Use a smaller batch or fewer pairs, or a quieter machine.",
        ) from None
    answer = _last_object(done.stdout)
    if "error" in answer:
        told = answer["error"]
        raise ForwardedError(
            f"In a latency session: {told['message']}",
            remedy=told["remedy"], code=told["code"], exit_code=told["exit_code"],
        )  # fmt: skip
    if done.returncode != 0 or not answer:
        raise VerificationError(
            f"A latency session died with exit code {done.returncode}: {done.stderr.strip()[-300:]}",
            remedy="Run the same command again; if it stays, open both files in onnxruntime by hand.",
        )
    return Session.from_json(answer)


def _last_object(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text.strip().rpartition("\n")[2]))
    except (ValueError, TypeError):
        return {}
