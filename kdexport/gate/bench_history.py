"""Results of `kdexport bench --json` over time: in the form that Bencher reads, and beside each other."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdexport.core.tables import Table
from kdexport.errors import ConfigError
from kdexport.gate.stored_latencies import BENCH_SCHEMA

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryPoint:
    """One measurement: when (UTC), the file, and the median latency with the lowest and highest of its sessions."""

    measured: str
    source: str
    ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HistorySeries:
    """Measurements of one arm that can be compared, in order: the same student, clock, batch, threads and machine."""

    arm: str
    setting: str
    machine: str
    points: tuple[HistoryPoint, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def bencher_metrics(data: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """A result of `kdexport bench` in the Bencher Metric Format: for each arm its latency in ns and images per second.

    ``lower_value`` and ``upper_value`` are the lowest and highest median of a session.
    """
    found = {}
    for arm, setting, row, key in _arms(data):
        low, value, high = _range(row, key)
        batch = int(row["batch"])
        found[f"{data['student']}/{arm}, {setting}"] = {
            "latency": {"value": 1e6 * value, "lower_value": 1e6 * low, "upper_value": 1e6 * high},
            "throughput": {
                "value": 1e3 * batch / value,
                "lower_value": 1e3 * batch / high,
                "upper_value": 1e3 * batch / low,
            },
        }
    return found


def read_history(paths: Sequence[Path]) -> tuple[HistorySeries, ...]:
    """The series of stored results, each in the order of its measurements; raises ``ConfigError`` for another file."""
    found: dict[tuple[str, str, str], list[HistoryPoint]] = {}
    for path in paths:
        for series, point in _read(path):
            found.setdefault(series, []).append(point)
    return tuple(
        HistorySeries(
            arm=arm, setting=setting, machine=machine, points=tuple(sorted(points, key=lambda point: point.measured))
        )
        for (setting, machine, arm), points in sorted(found.items())
    )


def _read(path: Path) -> list[tuple[tuple[str, str, str], HistoryPoint]]:
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
        data = answer.get("result", answer)
        if data["schema"] != BENCH_SCHEMA:
            raise ValueError(f"the schema must be {BENCH_SCHEMA}, got {data['schema']!r}")
        if not _TIME.fullmatch(str(data.get("measured"))):
            raise ValueError("it does not say when it was measured")
        machine = _described(data["machine"])
        found = []
        for arm, setting, row, key in _arms(data):
            low, value, high = _range(row, key)
            point = HistoryPoint(measured=data["measured"], source=str(path), ms=value, low_ms=low, high_ms=high)
            found.append(((f"{data['student']}, {setting}", machine, arm), point))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not a result of `kdexport bench --json` with a date: {type(error).__name__}: {error}.",
            remedy="Pass files that kdexport bench BUNDLE --json > FILE wrote.",
        ) from None
    return found


def _described(machine: Mapping[str, Any]) -> str:
    facts = (
        f"{machine['cpu']}, {machine['cores']} processors, {machine['system']}, onnxruntime {machine['onnxruntime']}"
    )
    return f"{facts}, {machine['gpu']}" if machine["gpu"] else facts


def _arms(data: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any], str]]:
    """(arm, clock and batch, row, key of its latencies) of every measurement of a result."""
    for row in data["latency"]:
        threads = int(row["threads"])
        setting = f"{row['clock']}, batch {int(row['batch'])}, {threads} thread{'s' * (threads != 1)}"
        for arm, key in zip(data["arms"], ("candidate_ms", "reference_ms"), strict=False):
            variant = arm in ("fused", "unfused")
            yield f"{arm} {data['target']}" if variant else str(arm), setting, row, key


def _range(row: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    """Lowest, median and highest latency of the sessions of a row, in ms."""
    sessions = [float(session[key]) for session in row["sessions"] if session[key] is not None]
    value = float(row[key])
    if not sessions or not 0 < min(sessions) <= value <= max(sessions):
        raise ValueError(f"{key} is {value}, which is not a median of its sessions")
    return min(sessions), value, max(sessions)


def history_tables(history: Sequence[HistorySeries]) -> list[Table]:
    """One table for each series, the oldest measurement first."""
    return [
        Table(
            title=f"{series.arm}: {series.setting}",
            header=("measured", "latency", "sessions", "against the first", "file"),
            rows=tuple(_history_row(point, series.points[0]) for point in series.points),
            note=series.machine,
        )
        for series in history
    ]


def _history_row(point: HistoryPoint, first: HistoryPoint) -> tuple[str, ...]:
    return (
        point.measured,
        f"{point.ms:.3f} ms",
        f"{point.low_ms:.3f} to {point.high_ms:.3f}",
        f"{point.ms / first.ms - 1:+.1%}",
        point.source,
    )


def history_html(history: Sequence[HistorySeries]) -> str:
    """The series as one page: a plot for each setting on one machine, and the tables."""
    from kdexport.report.page import history_page

    groups: dict[tuple[str, str], list[HistorySeries]] = {}
    for series in history:
        groups.setdefault((series.setting, series.machine), []).append(series)
    plots = [
        (
            setting,
            machine,
            {
                each.arm: [(point.measured, point.low_ms, point.ms, point.high_ms) for point in each.points]
                for each in of
            },
        )
        for (setting, machine), of in groups.items()
    ]
    return history_page(plots, history_tables(history))
