"""Reports of a gate: Markdown, JUnit XML, a plot of the paired ratios, and the sentences below them."""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from kdexport.core.files import require_writable_file, write_file, write_text
from kdexport.core.tables import Table, markdown_table, markdown_text
from kdexport.errors import BackendUnavailableError
from kdexport.gate.result import GateResult, latency_json

_MARKS = {"PASS": "\u2705", "FAIL": "\u274c", "INCONCLUSIVE": "\u2754", "WARN": "\u26a0\ufe0f"}
_COLOURS = {"PASS": "#2b8a4b", "FAIL": "#c62f1f", "INCONCLUSIVE": "#8a6d1f"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Paths of the reports to write; None for a report that was not requested."""

    junit: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None


def require_files(files: Files) -> None:
    """Raise if one of the reports could not be written; to be called before anything is timed."""
    if files.plot is not None:
        require_plots()
    for path in (files.junit, files.markdown, files.plot):
        require_writable_file(path)


def write_files(result: GateResult, files: Files) -> None:
    """Write each requested report atomically."""
    if files.junit is not None:
        write_text(files.junit, junit(result))
    if files.markdown is not None:
        write_text(files.markdown, markdown(result))
    if files.plot is not None:
        write_file(files.plot, lambda path: plot(result, path))


def check_table(result: GateResult, *, marks: bool = False) -> Table:
    """One row per check; if ``marks``, with a sign beside each verdict."""
    rows = tuple(
        (c.name, c.measured, c.allowed, f"{_MARKS[c.verdict]} {c.verdict}" if marks else c.verdict)
        for c in result.checks
    )
    return Table(header=("check", "measured", "allowed", "verdict"), rows=rows)


def sentence(result: GateResult) -> str:
    """The verdict with the reasons of the checks that decided it."""
    reasons = [f"{check.name}: {check.reason}" for check in result.checks if check.verdict == result.verdict]
    return f"{result.verdict} (exit {result.exit_code}). {'; '.join(reasons)}."


def facts(result: GateResult) -> list[str]:
    """What was measured and on which machine, one sentence per line."""
    lines = []
    for outcome in result.outcomes:
        row = latency_json(outcome, result.plan)
        if row["ratio"] is None:
            continue
        lines.append(
            f"{outcome.measurement.name}: reference {row['reference_ms']:.3f} ms, "
            f"candidate {row['candidate_ms']:.3f} ms, "
            f"{len(outcome.sessions)} sessions with a deviation of {row['session_deviation']:.2%} between them; "
            f"20 sessions detect {row['mde']:.1%} above the limit"
        )
    cpus = next((session.cpus for outcome in result.outcomes for session in outcome.sessions), ())
    loads = [value for outcome in result.outcomes for session in outcome.sessions for value in session.load]
    pinned = f"processors {', '.join(map(str, cpus))} of {result.machine.cores}" if cpus else "nothing was timed"
    load = f", load {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    lines.append(
        f"{result.machine.cpu}, {pinned}, {result.plan.threads} thread{'s' * (result.plan.threads > 1)}{load}, "
        f"{result.seconds:.0f} s; {result.calibration}"
    )
    return lines


def markdown(result: GateResult) -> str:
    """The result as Markdown, for a job summary."""
    lines = [
        f"## {_MARKS[result.verdict]} {result.verdict}: {markdown_text(result.question)}",
        "",
        f"`{result.candidate}` against `{result.reference}`",
        "",
        *markdown_table(check_table(result, marks=True)),
    ]
    lines += ["", *(f"- {markdown_text(check.name)}: {markdown_text(check.reason)}" for check in result.checks)]
    lines += ["", "<sub>", *(f"{markdown_text(line)}<br>" for line in facts(result)), "</sub>", ""]
    return "\n".join(lines)


def junit(result: GateResult) -> str:
    """The result as JUnit XML: FAIL is a failure, WARN is skipped, INCONCLUSIVE is an error by default."""
    counts = {"failures": 0, "errors": 0, "skipped": 0}
    suite = ElementTree.Element("testsuite", name="kdexport gate", tests=str(len(result.checks)))
    suite.set("time", f"{result.seconds:.2f}")
    for check in result.checks:
        case = ElementTree.SubElement(suite, "testcase", classname="kdexport.gate", name=check.name)
        kind = {"FAIL": "failure", "INCONCLUSIVE": "error", "WARN": "skipped"}.get(check.verdict)
        if check.verdict == "INCONCLUSIVE" and result.policy != "exit":
            kind = "skipped" if result.policy == "warn" else "failure"
        if kind is not None:
            ElementTree.SubElement(case, kind, message=check.reason).text = f"{check.measured}, allowed {check.allowed}"
            counts[{"failure": "failures", "error": "errors"}.get(kind, "skipped")] += 1
        ElementTree.SubElement(case, "system-out").text = f"{check.verdict}: {check.measured}. {check.reason}"
    for name, count in counts.items():
        suite.set(name, str(count))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def require_plots() -> None:
    """Raise ``BackendUnavailableError`` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendUnavailableError(
            "--plot needs matplotlib, which is not installed.",
            remedy="Run `pip install 'kdexport[plots]'`, or omit --plot.",
        )


def plot(result: GateResult, path: Path) -> None:
    """Write a PNG with the paired ratios of each session, the interval and the limit."""
    from matplotlib.figure import Figure

    timed = [outcome for outcome in result.outcomes if outcome.interval is not None]
    figure = Figure(figsize=(9, 1.2 + 3.2 * max(1, len(timed))), layout="constrained")
    for index, outcome in enumerate(timed):
        _draw(figure.add_subplot(len(timed), 1, index + 1), outcome, result)
    if not timed:
        figure.text(0.5, 0.5, result.outcomes[0].reason if result.outcomes else "nothing was timed", ha="center")
    figure.suptitle(f"{result.verdict}: {result.candidate} against {result.reference}", fontsize=11)
    figure.savefig(path, format="png", dpi=120)


def _draw(axes: Any, outcome: Any, result: GateResult) -> None:
    interval, limit = outcome.interval, 1 + result.plan.max_slowdown
    for number, session in enumerate(outcome.sessions, start=1):
        ratios = [b / a for a, b in session.pairs_ms]
        spread = [number + 0.5 * (k / max(1, len(ratios) - 1) - 0.5) for k in range(len(ratios))]
        axes.plot(spread, ratios, ".", color="#9aa5b1", markersize=3, zorder=1)
        axes.plot([number - 0.3, number + 0.3], [math.exp(session.log_ratio)] * 2, color="#1c2330", lw=2, zorder=3)
    colour = _COLOURS[outcome.verdict]
    axes.axhspan(math.exp(interval.low), math.exp(interval.high), color=colour, alpha=0.25, zorder=0)
    axes.axhline(limit, color="#c62f1f", ls="--", lw=1.2, label=f"allowed {limit:.3f}")
    axes.axhline(1.0, color="#5a6475", lw=0.8)
    centre = sorted(b / a for session in outcome.sessions for a, b in session.pairs_ms)
    low, high = centre[len(centre) // 20], centre[-1 - len(centre) // 20]
    margin = 0.1 * max(high - low, 0.01)
    axes.set_ylim(min(low, 1.0, math.exp(interval.low)) - margin, max(high, limit, math.exp(interval.high)) + margin)
    axes.set_xticks(range(1, len(outcome.sessions) + 1))
    axes.set_xlabel("session (one process each; dots are pairs, bars their medians, the band is the interval)")
    axes.set_ylabel("candidate / reference")
    axes.set_title(f"{outcome.measurement.name}: {outcome.verdict}", color=colour, fontsize=10, loc="left")
    axes.legend(loc="upper right", fontsize=8)
