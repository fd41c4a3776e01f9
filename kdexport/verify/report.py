"""A bundle's manifest as pages for people: Markdown for a job summary, one self-contained HTML file."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The rungs of the ladder, in their order; other checks are audits.
RUNGS = ("A", "B", "C", "D")


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, a header row, rows of text, and a sentence that says how to read it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def write_reports(folder: Path, data: dict[str, Any]) -> None:
    """Write report.md and report.html of a manifest into the bundle."""
    title = f"{data['student']['student']}: {verdict_sentence(data)}"
    tables = report_tables(data)
    bad = bool(failed_checks(data)) or (data.get("latency") or {}).get("verdict") == "slower"
    (folder / "report.md").write_text(_markdown(title, tables), encoding="utf-8")
    (folder / "report.html").write_text(_html(title, tables, bad), encoding="utf-8")


def failed_checks(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks of a manifest that do not hold."""
    return [check for check in data["parity"] if not check["holds"]]


def verdict_sentence(data: dict[str, Any]) -> str:
    """One sentence: what holds, what was not executed."""
    failed = failed_checks(data)
    if failed:
        return f"{len(failed)} of {len(data['parity'])} checks failed"
    latency = data.get("latency")
    waiting = [name for name, entry in data["targets"].items() if entry["status"] != "verified"]
    parts = [f"all {len(data['parity'])} checks hold"]
    if latency is not None:
        parts.append(
            f"{latency['verdict']} than the unfused student"
            if "slower" in latency["verdict"]
            else "latency inconclusive"
        )
    undecided = sum(bool(check.get("undecided")) for check in data["parity"])
    if undecided:
        parts.append(f"{undecided} statements about the task undecided by {data['task']['images']:,} images")
    if waiting:
        parts.append(f"{', '.join(waiting)} built, not executed")
    return "; ".join(parts)


def report_tables(data: dict[str, Any]) -> list[Table]:
    """Everything a reader of the bundle wants to know, as tables."""
    measured = (*_task(data), *_latency(data), *_targets(data), *_ladder(data), *_hazards(data))
    return [_summary(data), *measured, _certificate(data), _origin(data)]


def rung_rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per rung and file: the check nearest to its limit."""
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for check in data["parity"]:
        if check["rung"] not in RUNGS:
            continue
        key = (check["rung"], check["subject"])
        if key not in worst or _closeness(check) > _closeness(worst[key]):
            worst[key] = check
    return [(rung, subject, *_measured(check)) for (rung, subject), check in worst.items()]


def _closeness(check: dict[str, Any]) -> float:
    if not check["holds"]:
        return float("inf")
    if check["rung"] == "D":
        # What rung D is about, unless something else fails.
        return float(check["name"] == "flips")
    return float(check["measured"] / check["allowed"]) if check["allowed"] else 0.0


def _measured(check: dict[str, Any]) -> tuple[str, str, str]:
    word = "holds" if check["holds"] else "FAILS"
    if check["unit"] == "faults":
        return check["name"], "", word
    if check.get("undecided"):
        word = f"{word}, undecided"
    if check["unit"] == "of images":
        return f"{check['name']}: {check['measured']:.2%} of images", f"{check['allowed']:.2%}", word
    value = "not finite" if check["measured"] is None else f"{check['measured']:.3g}"
    allowed = f"{check['allowed']:.3g}"
    return f"{check['name']}: {value} {check['unit']}", allowed, word


def _summary(data: dict[str, Any]) -> Table:
    metrics = data["provenance"].get("metrics", {})
    certificate, operators = data["certificate"], data["operators"]
    rows = [
        ("operators", str(sum(operators["unfused"].values())), str(sum(operators["fused"].values()))),
        ("convolutions", str(operators["unfused"].get("Conv", 0)), str(operators["fused"].get("Conv", 0))),
        ("parameters", f"{certificate['unfused_parameters']:,}", f"{certificate['fused_parameters']:,}"),
    ]
    note = "Operators of the ONNX graph; the exporter itself folds batch norms of the unfused student, never branches."
    if "top1" in metrics:
        accuracy = f"Top-1 after the last epoch {metrics['top1']:.2%}"
        if "teacher_top1" in metrics:
            accuracy += f", teacher {metrics['teacher_top1']:.2%}"
        note = f"{accuracy}. {note}"
    return Table("Student", ("", "unfused", "fused"), tuple(rows), note)


def _targets(data: dict[str, Any]) -> Iterable[Table]:
    rows = [
        (name, entry["precision"], entry["status"], str(entry.get("kernels", "")), str(entry.get("version", "")))
        for name, entry in data["targets"].items()
    ]
    note = "'built, not executed': the engine was compiled and its layer table read, but no machine here can run it."
    yield Table("Targets", ("target", "precision", "status", "kernels", "builder"), tuple(rows), note)


def _ladder(data: dict[str, Any]) -> Iterable[Table]:
    rows = [(check["rung"], check["subject"], *_measured(check), str(check["detail"])) for check in data["parity"]]
    note = (
        f"{data['parity_images']} validation images and edge inputs. A: algebra in float64. B: error against the "
        "float64 oracle in multiples of the unfused fp32 model's own. C: the same in multiples of the simulated "
        "precision. D: the task."
    )
    yield Table("Checks", ("rung", "subject", "measured", "allowed", "", "detail"), tuple(rows), note)


def task_rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per file that ran on the validation set; bundles of earlier versions have none."""
    task = data.get("task") or {"files": {}}
    checks = {(check["subject"], check["name"]): check for check in data["parity"] if check["rung"] == "D"}
    return [
        (
            name,
            entry["precision"],
            f"{entry['top1']:.2%}",
            *(_claim(checks.get((name, key))) for key in ("top-1 lost", "flips", "unexplained flips")),
            f"{entry['mean_divergence']:.2g}",
        )
        for name, entry in task["files"].items()
    ]


def _claim(check: dict[str, Any] | None) -> str:
    if check is None:
        return ""
    word = "FAILS" if not check["holds"] else "undecided" if check.get("undecided") else "holds"
    counted = check["unit"] == "images"
    value = f"{check['measured']:.0f}" if counted else f"{check['measured']:.3%}"
    allowed = f"{check['allowed']:.0f}" if counted else f"{check['allowed']:.2%}"
    return f"{value} of {allowed} allowed: {word}"


def _task(data: dict[str, Any]) -> Iterable[Table]:
    rows = task_rows(data)
    if not rows:
        return
    task = data["task"]
    note = (
        f"{task['images']:,} validation images, paired with the unfused fp32 student (top-1 "
        f"{task['reference_top1']:.2%}). A flip is an image with another answer; it is unexplained where the reference "
        "was surer than any error that rungs B and C allow can overturn. 'undecided': so few images show neither that "
        "the limit is kept nor that it is broken."
    )
    header = ("file", "precision", "top-1", "top-1 lost", "flips", "unexplained", "mean KL, nats")
    yield Table("Task", header, tuple(rows), note)


def _latency(data: dict[str, Any]) -> Iterable[Table]:
    latency = data.get("latency")
    if latency is None:
        return
    row = (
        f"{latency['ratio']:.3f}",
        f"{latency['low']:.3f} to {latency['high']:.3f}",
        f"{latency['candidate_ms']:.3f} / {latency['reference_ms']:.3f} ms",
        str(latency["sessions"]),
        f"{1 + latency['max_slowdown']:.2f}",
        latency["verdict"],
    )
    note = (
        f"{latency['clock']}, batch {latency['batch']}, {latency['threads']} thread. Interleaved pairs; each session "
        f"is a fresh process. 20 sessions would tell a slowdown {latency['mde']:.1%} above the "
        f"allowed one (90 % power)."
    )
    header = ("fused / unfused", "99 % interval", "medians", "sessions", "allowed", "verdict")
    yield Table("Latency", header, (row,), note)


def _certificate(data: dict[str, Any]) -> Table:
    certificate = data["certificate"]
    blocks = sorted(certificate["blocks"], key=lambda block: -block["relative_error"])
    rows = [(block["name"], block["kind"], f"{block['relative_error']:.1e}") for block in blocks]
    whole = ("whole student", "", f"{certificate['whole_relative_error']:.1e}")
    note = f"float64 error relative to the block's largest output; up to {certificate['limit']:.0e} allowed."
    return Table("Merge certificate", ("block", "kind", "error"), (whole, *rows), note)


def hazard_rows(data: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Warnings of the fold: layer, kind, numbers; bundles of earlier versions have none."""
    return [(item["layer"], item["kind"], item["detail"]) for item in data["certificate"].get("hazards", [])]


def _hazards(data: dict[str, Any]) -> Iterable[Table]:
    rows = hazard_rows(data)
    if rows:
        note = "The merge is exact all the same; these layers lose more than others in float16 or int8."
        yield Table("Warnings", ("layer", "kind", "numbers"), tuple(rows), note)


def _origin(data: dict[str, Any]) -> Table:
    provenance = data["provenance"]
    rows = [(key, str(provenance[key])) for key in sorted(provenance) if key.endswith("sha256") or key == "seed"]
    rows += [(f"version of {name}", version) for name, version in data["versions"].items()]
    return Table("Origin", ("what", "value"), (("build key", data["build_key"]), *rows))


def _one_line(cell: str) -> str:
    return " ".join(html.escape(cell, quote=False).replace("|", "/").split())


def _markdown(title: str, tables: Sequence[Table]) -> str:
    lines = [f"# {title}", ""]
    for table in tables:
        lines += [f"## {table.title}", ""]
        lines += [f"| {' | '.join(table.header)} |", f"|{'---|' * len(table.header)}"]
        # A cell is one line without a separator, or the row falls apart.
        lines += [f"| {' | '.join(_one_line(cell) for cell in row)} |" for row in table.rows]
        lines += ["", table.note, ""] if table.note else [""]
    return "\n".join(lines)


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c2330;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.verdict{padding:.6rem 1rem;border-radius:.4rem;background:#e5f4e9;border-left:.4rem solid #2b8a4b}
.verdict.bad{background:#fbe9e7;border-color:#c62f1f}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.25rem .7rem .25rem 0;border-bottom:1px solid #dfe3ea;vertical-align:top}
th{color:#5a6475;font-weight:600}td.bad{color:#c62f1f;font-weight:700}p{color:#5a6475;margin:.4rem 0}
@media(prefers-color-scheme:dark){body{background:#14181f;color:#dde3ec}th,p{color:#98a2b3}th,td{border-color:#2b3340}
.verdict{background:#16301f}.verdict.bad{background:#3a1a17}}
"""


def _html(title: str, tables: Sequence[Table], failed: bool) -> str:
    parts = [_html_table(table) for table in tables]
    name, _, sentence = title.partition(": ")
    banner = f'<div class="verdict{" bad" if failed else ""}">{html.escape(sentence)}</div>'
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(name)}</h1>{banner}"
        f"{''.join(parts)}</html>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    body = "".join(
        "<tr>" + "".join(f"<td{_mark(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f"<h2>{html.escape(table.title)}</h2>{note}"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _mark(cell: str) -> str:
    return ' class="bad"' if cell == "FAILS" or cell.endswith(": FAILS") else ""
