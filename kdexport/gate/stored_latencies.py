"""A baseline of which only latencies are stored: a comparison with them may warn, but never fails a gate.

The same machine is not equally fast on two days. Therefore a small network, the anchor, is timed beside the student on
both days, and the latencies of the student are compared in units of it. The stored latencies must come from the same
machine and target, and from ten or more sessions; they give a prediction interval for one more session.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdexport.errors import BackendUnavailableError, ConfigError, MismatchError
from kdexport.gate.arms import Bundle
from kdexport.gate.result import Check
from kdexport.gate.sequential_test import Outcome, Plan
from kdexport.stats import sequential as statistics
from kdexport.targets import DEFAULT_TARGET
from kdexport.timing.anchor import write_anchor_network
from kdexport.timing.clocks import require_timeable
from kdexport.timing.machine import Machine

BENCH_SCHEMA = "kdexport.bench/2"
MIN_SESSIONS = 10


@dataclass(frozen=True, slots=True)
class StoredLatencies:
    """Log ratios candidate / anchor (one per session) by clock, batch size and number of threads."""

    rows: Mapping[tuple[str, int, int], tuple[float, ...]]


def write_anchor(folder: Path, clock: str) -> Path | None:
    """Write the anchor of ``clock`` into ``folder``; None if this machine cannot run it on that clock."""
    # A server runs on the same processor as the arms of the clock ``host``.
    try:
        require_timeable(DEFAULT_TARGET, "host" if clock == "serve" else clock)
    except BackendUnavailableError:
        return None
    return write_anchor_network(folder / "anchor.onnx")


def read_latencies(path: Path, bundle: Bundle, target: str, machine: Machine) -> StoredLatencies:
    """Read a result of ``kdexport bench --json`` for the same student, target and machine.

    Raises ``ConfigError`` if it is not such a file, ``MismatchError`` if it is for something else.
    """
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
        # Results stored before answers had an envelope.
        data = answer.get("result", answer)
        if data["schema"] != BENCH_SCHEMA:
            raise ValueError(f"the schema must be {BENCH_SCHEMA}, got {data['schema']!r}")
        student, classes, measured_on = data["student"], list(data["classes"]), dict(data["machine"])
        timed = f"{data['variant']} {data['target']}"
        rows = {
            (str(row["clock"]), int(row["batch"]), int(row["threads"])): _anchored(row["sessions"])
            for row in data["latency"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is neither a bundle nor a result of `kdexport bench --json`: {type(error).__name__}: {error}.",
            remedy="Pass --baseline with the bundle folder; stored latencies can only warn.",
        ) from None
    spec = bundle.manifest.spec
    if (student, classes) != (spec.student, list(spec.classes)):
        raise MismatchError(
            f"{path} is for {student} with {len(classes)} classes and {bundle.folder} for {spec.student} with "
            f"{spec.num_classes} classes, or their names or order differ.",
            remedy="Pass --baseline with latencies of the same student and classes.",
        )
    if timed != f"fused {target}":
        raise MismatchError(
            f"{path} contains latencies of {timed}; latencies of fused {target} are needed.",
            remedy="Pass --target with the stored target, or run `kdexport bench` with the gated target as first arm.",
        )
    if measured_on != asdict(machine):
        differ = [key for key, value in asdict(machine).items() if measured_on.get(key) != value]
        raise MismatchError(
            f"{path} was measured on a different machine (different {', '.join(differ)}); latencies of two machines "
            "cannot be compared.",
            remedy="Pass --baseline with the bundle folder: it is then timed here, beside the candidate.",
        )
    return StoredLatencies(rows)


def stored_checks(stored_latencies: StoredLatencies, outcomes: tuple[Outcome, ...], plan: Plan) -> list[Check]:
    """One check per outcome: the candidate's latency against the interval predicted by the stored ones. Never FAIL."""
    checks = []
    for outcome in outcomes:
        key = (outcome.measurement.clock, outcome.measurement.batch, plan.threads)
        stored = stored_latencies.rows.get(key, ())
        name = f"{outcome.measurement.name} against stored numbers"
        now = tuple(session.anchored for session in outcome.sessions if session.anchored is not None)
        if outcome.margin or not outcome.sessions:
            checks.append(
                Check(name=name, verdict="INCONCLUSIVE", measured="not measured", allowed="", reason=outcome.reason)
            )
        elif len(stored) < MIN_SESSIONS or not now:
            usable = (
                f"{len(stored)} stored sessions for this clock, batch and threads (at least {MIN_SESSIONS} required)"
            )
            reason = usable if now else "this machine cannot run the anchor on this clock"
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
    return Check(
        name=name,
        verdict="WARN" if slower else "PASS",
        measured=f"{ratio:.3f}x, {low:.3f} to {high:.3f}",
        allowed=f"{1 + plan.max_slowdown:.3f}x",
        reason=(
            f"{ratio:.3f}x of the stored latency, both in units of the anchor; {low:.3f} to {high:.3f} with the noise "
            "between sessions; stored latencies never fail a gate"
        ),
    )


def prediction(stored: Sequence[float], now: Sequence[float]) -> tuple[float, float, float]:
    """(low, ratio, high): the median session of ``now`` over the mean stored one, with the prediction interval of one
    new session.

    Both are log ratios candidate / anchor, one per session.
    """
    from scipy.special import stdtrit

    logs = np.asarray(stored, np.float64)
    count = len(logs)
    centre = float(np.median(now)) - float(logs.mean())
    half = float(stdtrit(count - 1, 1 - statistics.ALPHA_PER_LOOK)) * float(logs.std(ddof=1)) * math.sqrt(1 + 1 / count)
    return math.exp(centre - half), math.exp(centre), math.exp(centre + half)
