"""A baseline of which only numbers are left: they may warn, and nothing else.

Latencies of another day differ by whatever the machine did that day. So both days time an anchor beside the student,
the small network that comes with the gate, and what is compared is the student's latency in units of it. The numbers
must come from the same machine and the same kind of measurement, from ten or more sessions, and all they give is a
prediction interval for one more.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kdexport.errors import BackendUnavailableError, ConfigError, MismatchError
from kdexport.gate.arms import Bundle
from kdexport.gate.result import Check
from kdexport.gate.sequential_test import Outcome, Plan
from kdexport.stats import sequential as statistics
from kdexport.targets import DEFAULT_TARGET
from kdexport.timing.anchor import write_network
from kdexport.timing.clocks import require_timeable
from kdexport.timing.machine import Machine

BENCH_SCHEMA = "kdexport.bench/2"
MIN_SESSIONS = 10


def write_anchor(folder: Path, clock: str) -> Path | None:
    """The network that latencies on ``clock`` are stored in units of; None where this machine cannot run it there."""
    # The server runs on the processor that the arms of ``host`` run on.
    try:
        require_timeable(DEFAULT_TARGET, "host" if clock == "serve" else clock)
    except BackendUnavailableError:
        return None
    return write_network(folder / "anchor.onnx")


def read_numbers(path: Path, bundle: Bundle, target: str, machine: Machine) -> dict[str, Any]:
    """What ``kdexport bench --json`` wrote; raises where it is not that, or of another student or machine."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != BENCH_SCHEMA:
            raise ValueError(f"its schema is {data['schema']!r}")
        facts = (data["student"], list(data["classes"]), data["machine"])
        timed = f"{data['variant']} {data['target']}"
        rows = [(row["clock"], row["batch"], row["threads"], _anchored(row["sessions"])) for row in data["latency"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is neither a bundle nor numbers of `kdexport bench --json`: {type(error).__name__}: {error}.",
            remedy="Pass the folder of the baseline bundle; a gate on its files is worth more than one on numbers.",
        ) from None
    spec = bundle.manifest.spec
    if facts[:2] != (spec.student, list(spec.classes)):
        raise MismatchError(
            f"{path} has numbers of a {facts[0]} with {len(facts[1])} classes, {bundle.folder} is a {spec.student} "
            f"with {spec.num_classes}, or its classes differ.",
            remedy="Pass numbers of the same student and classes.",
        )
    if timed != f"fused {target}":
        raise MismatchError(
            f"{path} has numbers of {timed}, and fused {target} is gated.",
            remedy="Pass --target, or numbers whose first arm is what is gated.",
        )
    if facts[2] != asdict(machine):
        differ = [key for key, value in asdict(machine).items() if facts[2].get(key) != value]
        raise MismatchError(
            f"{path} was measured on another machine ({', '.join(differ)} differ); its numbers say nothing about this.",
            remedy="Pass the baseline bundle itself: it is then timed here, beside the candidate.",
        )
    return {"rows": rows, "path": str(path)}


def number_checks(numbers: dict[str, Any], outcomes: tuple[Outcome, ...], plan: Plan) -> list[Check]:
    """One check per outcome, PASS or WARN: the candidate's median against the interval that the numbers predict."""
    checks = []
    for outcome in outcomes:
        wanted = (outcome.number.clock, outcome.number.batch, plan.threads)
        stored: tuple[float, ...] = next((row[3] for row in numbers["rows"] if tuple(row[:3]) == wanted), ())
        name = f"{outcome.number.name} against stored numbers"
        now = tuple(session.anchored for session in outcome.sessions if session.anchored is not None)
        if outcome.margin or not outcome.sessions:
            checks.append(
                Check(name=name, verdict="INCONCLUSIVE", measured="not measured", allowed="", reason=outcome.reason)
            )
        elif len(stored) < MIN_SESSIONS or not now:
            usable = f"{len(stored)} usable sessions of this clock, batch and threads, {MIN_SESSIONS} needed"
            reason = usable if now else "this machine does not run the anchor on this clock"
            checks.append(Check(name=name, verdict="WARN", measured="none", allowed="", reason=reason))
        else:
            checks.append(_check(name, stored, now, plan))
    return checks


def _anchored(sessions: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    values = [float(session["anchored"]) for session in sessions if session["anchored"] is not None]
    return tuple(value for value in values if math.isfinite(value))


def _check(name: str, stored: Sequence[float], now: Sequence[float], plan: Plan) -> Check:
    low, ratio, high = prediction(stored, now)
    slower = high > 1 + plan.max_slowdown
    reason = (
        f"{ratio:.3f}x of the stored numbers, both in units of the anchor; {low:.3f} to {high:.3f} with the noise "
        "between sessions"
    )
    return Check(
        name=name,
        verdict="WARN" if slower else "PASS",
        measured=f"{ratio:.3f}x, {low:.3f} to {high:.3f}",
        allowed=f"{1 + plan.max_slowdown:.3f}x",
        reason=f"{reason}; numbers alone never fail a gate",
    )


def prediction(stored: Sequence[float], now: Sequence[float]) -> tuple[float, float, float]:
    """(low, ratio, high) of the median session of ``now`` over the mean stored one, as one new observation of them.

    Both are log ratios candidate / anchor, one for each session.
    """
    from scipy.special import stdtrit

    logs = np.asarray(stored, np.float64)
    count = len(logs)
    centre = float(np.median(now)) - float(logs.mean())
    half = float(stdtrit(count - 1, 1 - statistics.ALPHA_PER_LOOK)) * float(logs.std(ddof=1)) * math.sqrt(1 + 1 / count)
    return math.exp(centre - half), math.exp(centre), math.exp(centre + half)
