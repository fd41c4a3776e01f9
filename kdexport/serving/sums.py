"""Metrics and statistics of several processes as those of one server."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.utils import floatToGoString

#: Metrics that only grow: those of a process that ended stay in the sum.
_GROWING = ("counter", "histogram")
#: Of these the sum over processes has no meaning.
_LEAST = ("process_start_time_seconds", "process_max_fds")


@dataclass(frozen=True, slots=True)
class _Family:
    """A metric: its lines of help and type, and the values of each sample, by its name and labels as written."""

    head: list[str] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def grows(self) -> bool:
        return any(line.startswith("# TYPE ") and line.endswith(_GROWING) for line in self.head)


def summed_metrics(texts: Iterable[str], *, growing: bool = False) -> str:
    """The metrics of several processes, each as text in Prometheus' format, as one text.

    Gauges are summed too: connections, requests in progress, memory. ``growing`` leaves counters and histograms only.
    """
    families: dict[str, _Family] = {}
    for text in texts:
        _read(text, families)
    lines: list[str] = []
    for name, family in families.items():
        if family.grows or not growing:
            merge = min if name in _LEAST else sum
            lines += family.head
            lines += [f"{key} {_written(merge(values))}" for key, values in family.samples.items()]
    return "\n".join([*lines, ""])


def _written(value: float) -> str:
    """A number as in Prometheus' format."""
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _read(text: str, families: dict[str, _Family]) -> None:
    name = ""
    for line in text.splitlines():
        if line.startswith("#"):
            name = line.split(" ", 3)[2]
            family = families.setdefault(name, _Family())
            if line not in family.head:
                family.head.append(line)
        elif line:
            key, _, value = line.rpartition(" ")
            families[name].samples.setdefault(key, []).append(float(value))


def summed_statistics(parts: Iterable[Iterable[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Statistics in the form of Triton's, of several processes, as those of one server."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for part in parts:
        for row in part:
            key = (row["name"], row["version"])
            rows[key] = _added(rows[key], row) if key in rows else dict(row)
    return [row for _, row in sorted(rows.items())]


def _added(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    batches: dict[int, dict[str, Any]] = {}
    for row in (*first["batch_stats"], *second["batch_stats"]):
        size = row["batch_size"]
        batches[size] = dict(row) if size not in batches else {"batch_size": size, **_durations(batches[size], row)}
    return {
        "name": first["name"],
        "version": first["version"],
        "last_inference": max(first["last_inference"], second["last_inference"]),
        "inference_count": first["inference_count"] + second["inference_count"],
        "execution_count": first["execution_count"] + second["execution_count"],
        "inference_stats": _durations(first["inference_stats"], second["inference_stats"]),
        "batch_stats": [batches[size] for size in sorted(batches)],
    }


def _durations(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The sums of counts and nanoseconds of every part of the time."""
    return {
        name: {"count": value["count"] + second[name]["count"], "ns": value["ns"] + second[name]["ns"]}
        for name, value in first.items()
        if isinstance(value, Mapping)
    }
