"""The Markdown report of the serving benchmark, made from its raw results only."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

Row = dict[str, Any]

#: Names of outcomes in raw results that are printed under another name.
_OUTCOMES = {"waited as long as asked": "503 by its own timeout"}

#: Rows of raw results that do not name their machine are of this one.
_FORMER_MACHINE = "AMD EPYC, 2 cores"


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on a measured value of one cell: at least ``bound``, or for a latency at most."""

    model: str
    kind: str
    clients: int
    key: str
    bound: float

    @property
    def text(self) -> str:
        """What is compared, and with what."""
        words = {"ratio": "requests/s over bare, at least", "p99_ratio": "p99 over bare, at most"}
        return f"{words[self.key]} {self.bound:g}"

    def met(self, value: float) -> bool:
        """Whether a measured value is within the bound."""
        return value >= self.bound if self.key == "ratio" else value <= self.bound


_GOALS = (
    Goal("cifar-student", "FP32 binary", 8, "ratio", 1.0),
    Goal("cifar-student", "FP32 binary", 1, "ratio", 0.75),
    Goal("digits-student", "FP32 binary", 8, "ratio", 1.0),
    Goal("cifar-student", "JPEG", 8, "ratio", 0.8),
    Goal("mobilenetv2-224", "FP32 binary", 8, "ratio", 0.9),
    Goal("mobilenetv2-224", "JPEG", 8, "ratio", 0.8),
    Goal("cifar-student", "FP32 binary", 1, "p99_ratio", 1.5),
    Goal("mobilenetv2-224", "FP32 binary", 1, "p99_ratio", 1.5),
)

_PREFACE = """\
# Serving: speed and robustness

Made by `benchmarks/serving.py` from `serving.jsonl`. Client and server run on the same machine and share its cores.
Students have random weights, because speed does not depend on training. A ratio is the server's requests per second
over the images per second of bare onnxruntime (batch 1, one thread unless stated otherwise), measured just before and
just after the run; tables show the median of the rounds with the minimum and maximum. CPU is the server's CPU time per
request over that of bare onnxruntime per image. Runs in which other processes used more than the allowed share of a
core are left out if there is a quiet run; the last column counts the quiet runs. Without one, "over bare" is too low:
bare onnxruntime needs one core, the server and its clients need two. CPU over bare is hardly affected, and the ratio of
8 clients cannot exceed its inverse. Each machine was measured with the code of its day.
"""


def report(rows: Sequence[Row]) -> str:
    """The report: all topics that have results, in a fixed order."""
    by_topic: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_topic[row["topic"]].append(row)
    sections = [_PREFACE]
    makers: dict[str, Callable[[list[Row]], str]] = {
        "throughput": _throughput, "overload": _overload, "soak": _soak, "sigterm": _sigterm, "fuzz": _fuzz,
        "images": _images, "slow": _slow,
    }  # fmt: skip
    machines = dict.fromkeys(_machine_of(row) for row in sorted(rows, key=lambda row: -float(row["time"])))
    for name in machines:
        mine = {topic: [row for row in found if _machine_of(row) == name] for topic, found in by_topic.items()}
        days = sorted({_day(row) for found in mine.values() for row in found})
        sections.append(f"# {name}; measured {', '.join(days)}\n")
        if name == next(iter(machines)) and mine.get("throughput"):
            sections.append(_goals(mine["throughput"]))
        sections += [make(mine[topic]) for topic, make in makers.items() if mine.get(topic)]
    return "\n".join(sections)


def _machine_of(row: Row) -> str:
    return str(row.get("machine", _FORMER_MACHINE))


def _day(row: Row) -> str:
    return datetime.fromtimestamp(row["time"], UTC).date().isoformat()


def _goals(rows: list[Row]) -> str:
    """Every goal with the median of the kept runs, and whether it is met by it."""
    lines = []
    for goal in _GOALS:
        found = [
            row
            for row in rows
            if (row["model"], row["kind"], row["clients"], row["arm"])
            == (goal.model, goal.kind, goal.clients, "kdexport")
        ]
        kept = _kept(found)
        value = median(float(row[goal.key]) for row in kept) if kept else None
        verdict = "not measured" if value is None else "met" if goal.met(value) else "missed"
        quiet = f"{sum(row['quiet'] for row in found)} of {len(found)}"
        spread = "" if value is None else _spread(kept, goal.key)
        best = (
            ""
            if value is None
            else f"{(max if goal.key == 'ratio' else min)(float(row[goal.key]) for row in kept):.2f}"
        )
        lines.append([goal.model, goal.kind, str(goal.clients), goal.text, spread, best, verdict, quiet])
    head = ["student", "payload", "clients", "goal", "median (min to max)", "best run", "by the median", "quiet runs"]
    return f"## Goals\n\n{_table(head, lines)}"


def _kept(found: list[Row]) -> list[Row]:
    """The quiet runs, or all if there are none."""
    return [row for row in found if row["quiet"]] or found


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def _spread(rows: Sequence[Row], key: str) -> str:
    values = [float(row[key]) for row in rows]
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else f"{values[0]:.2f}"


def _throughput(rows: list[Row]) -> str:
    text = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        cells: dict[tuple[str, int, str], list[Row]] = defaultdict(list)
        for row in mine:
            cells[(row["kind"], row["clients"], row["arm"])].append(row)
        lines = [_cell(*key, found) for key, found in sorted(cells.items())]
        threads = {row["arm"]: row["bare_threads"] for row in mine if row["bare_threads"] > 1}
        note = "".join(f"\n{arm} is compared with {count} bare threads.\n" for arm, count in threads.items())
        bare = median(row["bare"]["rate"] for row in mine if row["bare_threads"] == 1)
        head = ["payload", "clients", "server", "requests/s", "over bare", "p50 over bare", "p99 over bare",
                "p50 / p99 ms", "CPU over bare", "RSS MB", "failed", "quiet runs"]  # fmt: skip
        text.append(f"## {model}: {bare:.0f} images/s bare\n{note}\n{_table(head, lines)}")
    return "\n".join(text)


def _cell(kind: str, clients: int, arm: str, found: list[Row]) -> list[str]:
    quiet = [row for row in found if row["quiet"]]
    kept = _kept(found)
    sent = "" if found[0]["sent_as"] == kind else f" (as {found[0]['sent_as']})"
    latency = [median(row["result"][key] for row in kept) for key in ("p50_ms", "p99_ms")]
    alone = clients == 1
    return [
        f"{kind}{sent}",
        str(clients),
        arm,
        f"{median(row['rate'] for row in kept):.0f}",
        _spread(kept, "ratio"),
        _spread(kept, "p50_ratio") if alone else "",
        _spread(kept, "p99_ratio") if alone else "",
        f"{latency[0]:.1f} / {latency[1]:.1f}",
        _spread(kept, "cpu_ratio"),
        f"{median(row['rss_mb'] for row in kept):.0f}",
        str(sum(row["result"]["refused"] + row["result"]["broken"] for row in found)),
        f"{len(quiet)} of {len(found)}",
    ]


def _overload(rows: list[Row]) -> str:
    lines = []
    for backoff in dict.fromkeys(row["backoff_ms"] for row in rows):
        found = [row for row in rows if row["backoff_ms"] == backoff]
        lines.append([
            "none" if backoff is None else f"{backoff} ms", _spread(found, "goodput"),
            f"{median(row['result']['p50_ms'] for row in found):.0f}",
            str(sum(row["result"]["ok"] for row in found)), str(sum(row["result"]["refused"] for row in found)),
            str(sum(row["result"]["broken"] for row in found)),
            f"{max(row['memory']['peak_mb'] for row in found):.0f}",
        ])  # fmt: skip
    head = ["back-off", "goodput over peak", "p50 ms, including refusals", "answered", "refused", "broken", "peak MB"]
    return f"## Overload: {rows[0]['clients']} clients, six times what is admitted\n\n{_table(head, lines)}"


def _soak(rows: list[Row]) -> str:
    lines = [
        [
            str(row["seconds"]), str(row["answered"]), str(row["failed"]),
            f"{row['rss_first_mb']:.0f}, {row['rss_last_mb']:.0f}, {row['rss_idle_mb']:.0f}",
            f"{row['slope_mb_per_hour']:.1f}", f"{row['later_range_mb']:.1f}",
            f"{row['descriptors_first']}, {row['descriptors_last']}, {row['descriptors_idle']}",
        ]
        for row in rows
    ]  # fmt: skip
    head = ["seconds", "answered", "failed", "RSS MB first, last, idle", "slope MB/h, last two thirds", "range MB",
            "descriptors first, last, idle"]  # fmt: skip
    return f"## Soak: binary tensors and JPEGs from 16 clients in turn\n\n{_table(head, lines)}"


def _sigterm(rows: list[Row]) -> str:
    lines = [
        [str(row["times"]), str(row["clients"]), _outcomes(row), str(row["fates"].get("broken", 0)),
         f"{row['slowest_stop_s']:.1f}"]
        for row in rows
    ]  # fmt: skip
    head = ["times", "clients", "answers", "without a complete response", "slowest stop, s"]
    return f"## SIGTERM under load\n\n{_table(head, lines)}"


def _outcomes(row: Row) -> str:
    return ", ".join(f"{_OUTCOMES.get(name, name)}: {count}" for name, count in row["fates"].items())


def _fuzz(rows: list[Row]) -> str:
    lines = [
        [str(row["count"]), str(row["seed"]), str(row["server_errors"]), f"{row['peak_mb']:.0f}", str(row["alive"]),
         _outcomes(row)]
        for row in rows
    ]  # fmt: skip
    return f"## Fuzzed requests\n\n{_table(['requests', 'seed', '5xx', 'peak MB', 'ready after', 'answers'], lines)}"


def _images(rows: list[Row]) -> str:
    lines = [
        [f"{row['kinds']} + {row['mutations']}", str(row["seed"]), str(row["server_errors"]), f"{row['peak_mb']:.0f}",
         str(row["alive"]), _outcomes(row)]
        for row in rows
    ]  # fmt: skip
    head = ["kinds + mutations", "seed", "5xx", "peak MB", "ready after", "answers"]
    return f"## Hostile images\n\n{_table(head, lines)}"


def _slow(rows: list[Row]) -> str:
    lines = [
        [row["mode"], str(row["connections"]), str(row["opened"]), f"{row['answered']} of {row['probes']}",
         f"{row['share']:.0%}", f"{row['peak_mb']:.0f}", str(row["alive_after"])]
        for row in rows
    ]  # fmt: skip
    head = ["slow part", "clients", "connections opened", "probes answered in 2 s", "share", "peak MB", "alive after"]
    return f"## Slow clients, 1024 file descriptors\n\n{_table(head, lines)}"
