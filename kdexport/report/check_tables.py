"""The checks and the origin of a bundle as tables of text, and its verdict as a sentence."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kdexport.bundle.manifest import has_synthetic_images
from kdexport.core.tables import Table
from kdexport.data.preprocessing import Preprocessing
from kdexport.verify.check import has_failed, has_run

#: The rungs of the ladder in order; all other checks are audits.
RUNGS = ("A", "B", "C", "D")

_PLAN_HEADER = ("plan", "top-1", "flips", "noise", "mean KL, nats", "size", "latency")


def failed_checks(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks of a manifest that failed."""
    return [check for check in data["parity"] if has_failed(check)]


def beyond_checks(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks of a manifest whose measured value is beyond the limit, undecided with the images of the task."""
    return [check for check in data["parity"] if check.get("beyond")]


def not_run_checks(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks of a manifest that did not run; they neither hold nor failed."""
    return [check for check in data["parity"] if not has_run(check)]


def verdict_sentence(data: dict[str, Any], not_run: Sequence[str] | None = None) -> str:
    """One sentence: which checks hold, and which targets were not executed.

    ``not_run`` describes the targets that did not run in a verification of a finished bundle; None takes the statuses
    of the manifest.
    """
    failed, absent = failed_checks(data), len(not_run_checks(data))
    ran = len(data["parity"]) - absent
    if failed:
        return f"{len(failed)} of {ran} checks failed"
    latency = data.get("latency")
    not_executed = [name for name, entry in data["targets"].items() if entry["status"] != "verified"]
    beyond = len(beyond_checks(data))
    parts = [f"all {ran} checks hold"]
    if beyond:
        parts = [
            f"{beyond} of {ran} checks beyond the limit, undecided with "
            f"{data['task']['images']:,} images; the others hold"
        ]
    if absent:
        parts.append(f"{absent} {'check' if absent == 1 else 'checks'} did not run")
    if latency is not None:
        decided = "slower" in latency["verdict"]
        parts.append(f"{latency['verdict']} than the unfused student" if decided else "latency inconclusive")
    undecided = sum(bool(check.get("undecided")) for check in data["parity"])
    if undecided > beyond:
        parts.append(f"{undecided - beyond} checks of the task undecided with {data['task']['images']:,} images")
    if not_run is not None:
        parts += not_run
    elif not_executed:
        parts.append(f"{', '.join(not_executed)} built, not executed")
    return "; ".join(parts)


def report_tables(data: dict[str, Any]) -> list[Table]:
    """The report as tables, in the order of the page."""
    measured = (*_task(data), *_latency(data), *_targets(data), *plan_tables(data), *_ladder(data), *_hazards(data))
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
    if not has_run(check):
        return -1.0
    if not check["holds"]:
        return float("inf")
    if check["rung"] == "D":
        # Rung D shows its flips unless another check fails.
        return float(check["name"] == "flips")
    return float(check["measured"] / check["allowed"]) if check["allowed"] else 0.0


def _measured(check: dict[str, Any]) -> tuple[str, str, str]:
    word = _word(check)
    if check["unit"] == "faults":
        return check["name"], "", word
    if check.get("undecided"):
        word = f"{word}, undecided"
    if check["unit"] == "of images":
        measured, allowed = _number(check["measured"], ".2%"), _number(check["allowed"], ".2%")
        return f"{check['name']}: {measured} of images", allowed, word
    value, allowed = _number(check["measured"], ".3g"), _number(check["allowed"], ".3g")
    return f"{check['name']}: {value} {check['unit']}", allowed, word


def _word(check: dict[str, Any]) -> str:
    if not has_run(check):
        return "did not run"
    return "holds" if check["holds"] else "FAILS" if has_failed(check) else "beyond"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(float(value), form)


def _summary(data: dict[str, Any]) -> Table:
    metrics = data["provenance"].get("metrics", {})
    certificate, operators = data["certificate"], data["operators"]
    rows = [
        ("operators", str(sum(operators["unfused"].values())), str(sum(operators["fused"].values()))),
        ("convolutions", str(operators["unfused"].get("Conv", 0)), str(operators["fused"].get("Conv", 0))),
        ("parameters", f"{certificate['unfused_parameters']:,}", f"{certificate['fused_parameters']:,}"),
    ]
    note = "Operators of the ONNX graph. The exporter itself folds batch norms of the unfused student, but no branches."
    if "top1" in metrics:
        accuracy = f"Top-1 after the last epoch {metrics['top1']:.2%}"
        if "teacher_top1" in metrics:
            accuracy += f", teacher {metrics['teacher_top1']:.2%}"
        note = f"{accuracy}. {note}"
    return Table(title="Student", header=("", "unfused", "fused"), rows=tuple(rows), note=note)


def _targets(data: dict[str, Any]) -> Iterable[Table]:
    rows = [
        (
            name,
            entry["precision"],
            entry.get("input", "float32"),
            entry.get("output", "logits"),
            entry["status"],
            str(entry.get("kernels", "")),
            str(entry.get("version", "")),
        )
        for name, entry in data["targets"].items()
    ]
    note = "'built, not executed': the file was built and its layers were checked, but this machine cannot run it."
    yield Table(
        title="Targets",
        header=("target", "precision", "input", "output", "status", "kernels", "builder"),
        rows=tuple(rows),
        note=note,
    )


def _ladder(data: dict[str, Any]) -> Iterable[Table]:
    rows = [(check["rung"], check["subject"], *_measured(check), str(check["detail"])) for check in data["parity"]]
    note = (
        f"{data['parity_images']} validation images and edge inputs. A: algebra in float64. B: error against the "
        "float64 oracle, in multiples of the unfused fp32 model's own error. C: the same, in multiples of the error of "
        "a simulation. D: the task."
    )
    if said := golden_sentence(data):
        note += f" Golden images: {said}"
    yield Table(
        title="Checks", header=("rung", "subject", "measured", "allowed", "", "detail"), rows=tuple(rows), note=note
    )


def _task_rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each file that ran on the validation set; none for bundles of earlier versions."""
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
    word = "within, undecided" if check["holds"] and check.get("undecided") else _word(check)
    word = "beyond, undecided" if word == "beyond" else word
    counted = check["unit"] == "images"
    value = _number(check["measured"], ".0f" if counted else ".3%")
    allowed = _number(check["allowed"], ".0f" if counted else ".2%")
    return f"{value} of {allowed} allowed: {word}"


def _task(data: dict[str, Any]) -> Iterable[Table]:
    rows = _task_rows(data)
    if not rows:
        return
    task = data["task"]
    note = (
        f"{task['images']:,} validation images, paired with the unfused fp32 student (top-1 "
        f"{task['reference_top1']:.2%}). A flip is an image with another answer. It is unexplained if the reference's "
        "margin is larger than any error that rungs B and C allow can overturn. 'undecided': the measured value is "
        "within or beyond its limit, and this number of images does not show whether the true one is."
    )
    header = ("file", "precision", "top-1", "top-1 lost", "flips", "unexplained", "mean KL, nats")
    yield Table(title="Task", header=header, rows=tuple(rows), note=note)


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
        f"{latency['clock']}, batch {latency['batch']}, {latency['threads']} thread{'s' * (latency['threads'] > 1)}. "
        f"Interleaved pairs; each session is a new process. 20 sessions detect a slowdown {latency['mde']:.1%} above "
        "the allowed one with 90 % power."
    )
    header = ("fused / unfused", "99 % interval", "medians", "sessions", "allowed", "verdict")
    yield Table(title="Latency", header=header, rows=(row,), note=note)


def _plan_entries(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(targets, plan) of each plan of a manifest; targets of one form share a plan."""
    searched = [(name, entry["plan"]) for name, entry in data["targets"].items() if "plan" in entry]
    while searched:
        plan = searched[0][1]
        yield ", ".join(name for name, other in searched if other == plan), plan
        searched = [(name, other) for name, other in searched if other != plan]


def _plan_rows(plan: dict[str, Any]) -> list[tuple[str, ...]]:
    """The costs of the float32 graph, the plain cast and the chosen plan on the images of the search."""
    plain, chosen = plan["trades"][0], plan["trades"][plan["chosen"]]
    rows = [("float32", plan["float32"]), ("int8, no plan", plain)]
    if plan["chosen"]:
        rows.append((f"int8, {_plan_summary(chosen)}", chosen))
    return [(name, *_costs(cost)) for name, cost in rows]


def plan_tables(data: dict[str, Any]) -> Iterator[Table]:
    """One table for each plan of a manifest."""
    for name, plan in _plan_entries(data):
        yield Table(
            title=f"Precision plan of {name}",
            header=_PLAN_HEADER,
            rows=tuple(_plan_rows(plan)),
            note=_plan_note(plan),
        )


def _plan_note(plan: dict[str, Any]) -> str:
    """How many plans were measured, within which limits, and why the chosen one differs from the plain cast."""
    budget = plan["budget"]
    noise = "" if budget["noise"] is None else f" and {budget['noise']:.1%} noise"
    parts = [
        f"{len(plan['trades'])} plans measured on {plan['images']:,} training images against the float32 graph (up to "
        f"{budget['flips']:.2%} flips and {budget['top1_drop']:.2%} top-1 lost{noise} allowed). Rung D judges the "
        "chosen plan on validation images. Latency: median of single images on one thread of onnxruntime."
    ]
    if plan["collapsed"]:
        parts.append("Without a plan int8 collapses: its logits differ too much from the float32 ones.")
    parts += [f"{reason}." for reason in plan["reasons"]]
    if plan["kept"]:
        parts.append(f"Kept in float32: {', '.join(layer['node'] for layer in plan['kept'])}.")
    return " ".join(parts)


def _costs(cost: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{cost['top1']:.2%}",
        f"{cost['flips']:.2%}",
        "not finite" if cost["noise"] is None else f"{cost['noise']:.1%}",
        "not finite" if cost["divergence"] is None else f"{cost['divergence']:.2g}",
        f"{cost['bytes'] / 1e3:,.0f} kB",
        "not run" if cost["latency_ms"] is None else f"{cost['latency_ms']:.3f} ms",
    )


def _plan_summary(cost: dict[str, Any]) -> str:
    counts = ((cost["equalised"], "pair", "equalised"), (len(cost["kept"]), "layer", "in float32"))
    return ", ".join(f"{count} {what}{'s' * (count > 1)} {how}" for count, what, how in counts if count)


def _certificate(data: dict[str, Any]) -> Table:
    certificate = data["certificate"]
    blocks = sorted(certificate["blocks"], key=lambda block: -block["relative_error"])
    rows = [(block["name"], block["kind"], f"{block['relative_error']:.1e}") for block in blocks]
    whole = ("whole student", "", f"{certificate['whole_relative_error']:.1e}")
    note = f"float64 error relative to the largest output of the block; up to {certificate['limit']:.0e} allowed."
    return Table(title="Merge certificate", header=("block", "kind", "error"), rows=(whole, *rows), note=note)


def golden_sentence(data: dict[str, Any]) -> str:
    """Why images were not taken as golden images, or all are of a kind that the server refuses; empty if neither."""
    passed, refused = data.get("golden_passed_over", {}), data.get("golden_refused", {})
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in (passed or refused).items())
    if passed:
        return f"{sum(passed.values()):,} images passed over, because kdexport serve would refuse them: {kinds}."
    return f"kdexport serve would refuse every validation image as an upload: {kinds}." if refused else ""


def images_inside(data: dict[str, Any]) -> str:
    """Which images the bundle holds, in one sentence."""
    count, described = len(data["golden"]), data.get("golden_images")
    if described is None:
        return f"{count} validation images, as their files were, with their metadata (built by an earlier version)"
    if has_synthetic_images(data):
        return f"{count} computed images; no image of a data set is inside"
    positions = ", ".join(map(str, described["positions"]))
    shown = ", ".join(map(str, data.get("report_images", ())))
    in_report = f"; report.html shows those at the positions {shown}, scaled down" if shown else ""
    return f"{count} images of the validation split without metadata, at the positions {positions}{in_report}"


def hazard_rows(data: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Warnings of the fold: layer, kind, numbers; none for bundles of earlier versions."""
    return [(item["layer"], item["kind"], item["detail"]) for item in data["certificate"].get("hazards", [])]


def _hazards(data: dict[str, Any]) -> Iterable[Table]:
    rows = hazard_rows(data)
    if rows:
        note = "The merge is exact. These layers lose more precision than others in float16 or int8."
        yield Table(title="Warnings", header=("layer", "kind", "numbers"), rows=tuple(rows), note=note)


def _origin(data: dict[str, Any]) -> Table:
    provenance = data["provenance"]
    preprocessing = Preprocessing.from_json(data["student"]["preprocessing"])
    rows = [("preprocessing", preprocessing.describe()), ("golden images", images_inside(data))]
    rows += [(key, str(provenance[key])) for key in sorted(provenance) if key.endswith("sha256") or key == "seed"]
    rows += [(f"version of {name}", version) for name, version in data["versions"].items()]
    return Table(title="Origin", header=("what", "value"), rows=(("build key", data["build_key"]), *rows))
