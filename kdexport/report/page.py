"""The pages of a bundle for people: report.md for a job summary, and report.html, which a release can carry."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from kdexport.core.tables import Table, markdown_page
from kdexport.data.preprocessing import Preprocessing
from kdexport.report import figures
from kdexport.report.bundle_diff import BundleDiff, diff_tables
from kdexport.report.check_tables import (
    beyond_checks,
    failed_checks,
    images_inside,
    report_tables,
    verdict_sentence,
)
from kdexport.report.contents import (
    Evidence,
    TargetFacts,
    calibration_of,
    explained_margins,
    flip_margins,
    main_file,
    reference_top1,
    scores_of,
    served_elsewhere,
    shown_images,
    target_facts,
    unfused_bytes,
)
from kdexport.report.figures import MergedKind, TargetPoint
from kdexport.stats.proportions import Estimate
from kdexport.stats.scores import Scores
from kdexport.verify.answers import REFERENCE

if TYPE_CHECKING:
    from jinja2 import Environment

P = ParamSpec("P")

#: Classes in the plot of classes; the table has all.
_SHOWN_CLASSES = 16
_SHOWN_MISTAKES = 12
#: Kinds of blocks and parallel paths in the picture of the merge.
_SHOWN_KINDS, _SHOWN_PATHS = 4, 5
NOT_RECORDED = "not recorded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A plot with its heading, what a screen reader says, and a caption."""

    title: str
    svg: str
    said: str
    caption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Thumbnail:
    """An image as a data URI, empty if it is not shown, with its text alternative, its class, and further lines."""

    source: str
    said: str
    label: str
    lines: tuple[str, ...]


def write_reports(folder: Path, data: dict[str, Any], evidence: Evidence | None = None) -> None:
    """Write report.md and report.html of a manifest into the bundle; the same input gives the same bytes."""
    measured = evidence or Evidence()
    title = f"{data['student']['student']}: {verdict_sentence(data)}"
    tables = [targets_table(data, measured), *report_tables(data)]
    (folder / "report.md").write_text(markdown_page(title, tables), encoding="utf-8")
    (folder / "report.html").write_text(report_html(data, measured), encoding="utf-8")


def report_html(data: dict[str, Any], evidence: Evidence) -> str:
    """report.html: one file that loads nothing."""
    name, sentence, bad = str(data["student"]["student"]), verdict_sentence(data), is_bad(data)
    facts, classes = target_facts(data, evidence), tuple(map(str, data["student"].get("classes", ())))
    shown = main_file(evidence)
    scores = scores_of(shown, evidence, classes)
    images_title, images_note, images = _images(data, evidence, classes)
    return render(
        "report",
        title=f"{name}: {sentence}",
        name=name,
        word="FAIL" if bad else "PASS",
        bad=bad,
        sentence=sentence,
        facts=_facts(data),
        targets=targets_table(data, evidence),
        target_notes=_target_notes(data, facts),
        missing=_missing(scores),
        plots=[_targets_plot(data, facts, evidence), *_score_plots(data, evidence, scores, shown)],
        numbers=[] if scores is None else _number_tables(scores, data, evidence, classes),
        images_title=images_title,
        images_note=images_note,
        images=images,
        student_plots=_student_plots(data),
        student=_student_table(data),
        commands=_commands(),
        use=_use(data),
        classes=classes,
        tables=report_tables(data),
    )


def diff_html(diff: BundleDiff) -> str:
    """Two bundles beside each other as one file that loads nothing."""
    a, b = diff.a, diff.b
    points = [
        TargetPoint(
            name=f"{pair.name} {side}",
            megabytes=None if facts.bytes is None else facts.bytes / 1e6,
            latency_ms=None if facts.latency is None else _finite(facts.latency["ms"]),
            top1=facts.top1,
        )
        for pair in diff.targets
        for side, facts in (("A", pair.a), ("B", pair.b))
        if facts is not None
    ]
    said = "Size, latency and top-1 of each target in A and in B; the numbers are in the table of targets."
    return render(
        "diff",
        title=f"{a.student}: {a.folder} and {b.folder}",
        name=f"{a.student}: A and B" if a.student == b.student else f"{a.student} and {b.student}",
        word="Same" if diff.same else "Differ",
        bad=not (a.passes and b.passes),
        sentence=_diff_sentence(diff),
        tables=diff_tables(diff),
        picture=Plot(title="A and B", svg=_drawn(figures.target_panels, points, None), said=said, caption=said),
    )


def history_page(
    plots: Sequence[tuple[str, str, Mapping[str, Sequence[figures.TimedPoint]]]], tables: Sequence[Table]
) -> str:
    """Latencies over time; ``plots`` are (setting, machine, points by arm)."""
    name = "Latency over time"
    return render(
        "history",
        title=name,
        name=name,
        sentence="Medians of the sessions of each measurement, with the lowest and highest of them.",
        plots=[
            Plot(
                title=setting,
                svg=_drawn(figures.history_lines, number, arms),
                said=f"Latency over time of {', '.join(arms)}; the numbers are in the tables below.",
                caption=machine,
            )
            for number, (setting, machine, arms) in enumerate(plots)
        ],
        tables=tables,
    )


def _diff_sentence(diff: BundleDiff) -> str:
    failed = [name for name, side in (("A", diff.a), ("B", diff.b)) if not side.passes]
    passed = f"{' and '.join(failed)} did not pass at the build" if failed else "both passed at their build"
    return f"{len(diff.files)} files differ; {passed}." if diff.files else f"Every file is the same; {passed}."


def render(template: str, **values: Any) -> str:
    """A page by jinja2. Every value is escaped; only the plots of ``figures`` are markup."""
    return str(_environment().get_template(template).render(**values))


@functools.cache
def _environment() -> "Environment":
    from jinja2 import DictLoader, Environment, StrictUndefined

    from kdexport.report import templates

    pages = {
        "macros": templates.MACROS,
        "report": templates.REPORT,
        "diff": templates.DIFF,
        "history": templates.HISTORY,
    }
    environment = Environment(
        loader=DictLoader(pages), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["failing"] = is_failing
    environment.globals["style"] = _markup(templates.STYLE)
    return environment


def is_failing(cell: str) -> bool:
    """Whether a cell of a table says that a check failed."""
    return cell == "FAILS" or cell.endswith(": FAILS")


def is_bad(data: dict[str, Any]) -> bool:
    """Whether the verdict of a manifest is shown as one that does not pass."""
    return bool(failed_checks(data) or beyond_checks(data)) or (data.get("latency") or {}).get("verdict") == "slower"


def _drawn(draw: Callable[P, str], *numbers: P.args, **named: P.kwargs) -> str:
    """A plot of ``figures`` as markup."""
    return _markup(draw(*numbers, **named))


def _markup(source: str) -> str:
    from markupsafe import Markup

    return Markup(source)  # noqa: S704, the text is of this package or of matplotlib


def targets_table(data: dict[str, Any], evidence: Evidence) -> Table:
    """The first table: each target with its size, latency, accuracy and flips, below the student as it was trained."""
    rows = [_reference_row(data, evidence), *(_target_row(facts) for facts in target_facts(data, evidence))]
    header = ("target", "size", "latency", "top-1", "flips", "calibration error", "status")
    return Table(title="Targets", header=header, rows=tuple(rows))


def _reference_row(data: dict[str, Any], evidence: Evidence) -> tuple[str, ...]:
    latency, top1 = data.get("latency"), reference_top1(data)
    error = calibration_of(REFERENCE, evidence)
    return (
        "unfused student, as trained",
        _size(unfused_bytes(evidence)),
        NOT_RECORDED if latency is None else f"{latency['reference_ms']:.3f} ms",
        NOT_RECORDED if top1 is None else _interval(top1),
        "",
        NOT_RECORDED if error is None else f"{error:.2%}",
        "the reference",
    )


def _target_row(facts: TargetFacts) -> tuple[str, ...]:
    return (
        facts.name,
        _size(facts.bytes),
        _latency(facts),
        NOT_RECORDED if facts.top1 is None else _interval(facts.top1),
        NOT_RECORDED if facts.flips is None else f"{facts.flips:,} of {facts.images:,}",
        NOT_RECORDED if facts.calibration_error is None else f"{facts.calibration_error:.2%}",
        "\n".join(filter(None, (facts.status, facts.device))),
    )


def _latency(facts: TargetFacts) -> str:
    if facts.latency is None:
        return f"not timed\n{facts.not_timed}" if facts.not_timed else NOT_RECORDED
    ratio, sessions = facts.latency["ratio"], facts.latency["sessions"]
    compared = "" if ratio is None else f"{ratio:.2f} x onnx-fp32, "
    return f"{facts.latency['ms']:.3f} ms\n{compared}{sessions} session{'s' * (sessions != 1)}"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.2%}\n{estimate.low:.2%} to {estimate.high:.2%}"


def _size(count: int | None) -> str:
    return NOT_RECORDED if count is None else f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _facts(data: dict[str, Any]) -> str:
    parts = [f"kdexport {data.get('kdexport', 'of an unknown version')}", f"build {str(data['build_key'])[:12]}"]
    if times := data.get("target_times"):
        parts.append(f"measured {times['measured'].replace('T', ' ').removesuffix('Z')} UTC")
    preprocessing = data["student"]["preprocessing"]
    classes = len(data["student"].get("classes", ()))
    parts.append(f"{classes} classes, {preprocessing['image_size']} x {preprocessing['image_size']} pixels")
    return ", ".join(parts)


def _target_notes(data: dict[str, Any], facts: Sequence[TargetFacts]) -> list[str]:
    notes = []
    if task := data.get("task"):
        notes.append(
            f"Top-1 of {task['images']:,} validation images, with the exact 95 % interval. A flip is an image for "
            "which the file gives another class than the unfused student."
        )
    if times := data.get("target_times"):
        machine = times["machine"]
        accelerator = f", {machine['gpu']}" if machine.get("gpu") else ""
        notes.append(
            f"Latency: batch {times['batch']}, {times['threads']} thread{'s' * (times['threads'] != 1)}, "
            f"{machine['cpu']}, {machine['cores']} processors, {machine['system']}{accelerator}, onnxruntime "
            f"{machine['onnxruntime']}. Medians over new processes, without a verdict; kdexport bench and gate give "
            "intervals. The ratio to onnx-fp32 is of blocks timed in turn, so that it compares better."
        )
    replaced = ", ".join(each.name for each in facts if each.by_reference)
    if replaced:
        notes.append(f"{replaced} did not run here: accuracy is that of its ONNX file, in onnxruntime on a CPU.")
    return notes


def _missing(scores: Scores | None) -> list[str]:
    if scores is not None:
        return []
    return ["Accuracy by class, calibration and confusion: not recorded in this bundle."]


def _targets_plot(data: dict[str, Any], facts: Sequence[TargetFacts], evidence: Evidence) -> Plot:
    latency = data.get("latency")
    size = unfused_bytes(evidence)
    points = [
        TargetPoint(
            name="unfused",
            megabytes=None if size is None else size / 1e6,
            latency_ms=None if latency is None else _finite(latency["reference_ms"]),
            top1=reference_top1(data),
        ),
        *(
            TargetPoint(
                name=each.name,
                megabytes=None if each.bytes is None else each.bytes / 1e6,
                latency_ms=None if each.latency is None else _finite(each.latency["ms"]),
                top1=each.top1,
            )
            for each in facts
        ),
    ]
    teacher = data["provenance"].get("metrics", {}).get("teacher_top1")
    said = "; ".join(f"{row[0]}: {', '.join(row[1:4])}" for row in targets_table(data, evidence).rows)
    return Plot(
        title="Targets beside each other",
        svg=_drawn(figures.target_panels, points, _finite(teacher)),
        said=f"Size, latency and top-1 of each target. {' '.join(said.split())}",
        caption="Size, latency, and accuracy with its 95 % interval; the numbers are in the table above.",
    )


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _score_plots(data: dict[str, Any], evidence: Evidence, scores: Scores | None, shown: str) -> list[Plot]:
    plots = []
    if scores is not None:
        error = scores.calibration_error
        plots += [
            _classes_plot(scores, shown),
            Plot(
                title="Calibration",
                svg=_drawn(figures.reliability, scores.bins),
                said=f"Reliability diagram of {shown}: expected calibration error {error.value:.2%}, 95 % interval "
                f"{error.low:.2%} to {error.high:.2%}.",
                caption=f"{shown}: expected calibration error {error.value:.2%} ({error.low:.2%} to {error.high:.2%}). "
                "Below the line the network is surer than it should be.",
            ),
            _confusion_plot(scores, shown),
        ]
    if evidence.record is not None and np.isfinite(evidence.record.reference.margins).all():
        plots.append(_margins_plot(data, evidence))
    return plots


def _classes_plot(scores: Scores, shown: str) -> Plot:
    seen = sorted(
        (each for each in scores.classes if each.recall is not None),
        key=lambda each: each.recall.value if each.recall else 0.0,
    )
    lowest = seen[:_SHOWN_CLASSES]
    listed = "; ".join(f"{each.name} {each.recall.value:.1%}" for each in lowest if each.recall)
    which = "all classes" if len(lowest) == len(scores.classes) else f"the {len(lowest)} lowest of {len(seen)} classes"
    return Plot(
        title="Accuracy by class",
        svg=_drawn(figures.class_dots, lowest),
        said=f"Share of the images of each class that {shown} recognises: {listed}.",
        caption=f"{shown}, {which}, lowest first, with 95 % intervals.",
    )


def _confusion_plot(scores: Scores, shown: str) -> Plot:
    mistakes = "; ".join(f"{count} x {true} taken for {said}" for true, said, count in scores.most_confused(5))
    return Plot(
        title="Confusion",
        svg=_drawn(figures.confusion_map, scores.confusion, [each.name for each in scores.classes]),
        said=f"Confusion matrix of {shown}. Most frequent mistakes: {mistakes or 'none'}.",
        caption=f"{shown}: true classes in rows, predicted ones in columns, shaded by share of the row."
        + (f" Most frequent: {mistakes}." if mistakes else " No mistakes."),
    )


def _margins_plot(data: dict[str, Any], evidence: Evidence) -> Plot:
    record = evidence.record
    assert record is not None
    names = file_names(data, evidence)
    flips = {names[name]: found for name, found in flip_margins(record).items()}
    limits = {names[name]: limit for name, limit in explained_margins(record, data).items() if np.isfinite(limit)}
    counted = ", ".join(f"{name} {len(found):,}" for name, found in flips.items())
    return Plot(
        title="Margins and flips",
        svg=_drawn(figures.margin_histogram, record.reference.margins.astype(np.float64), flips, limits),
        said=f"Histogram of the margins of the unfused student. Flips by file: {counted}.",
        caption="How far the likeliest class is ahead of the next, in the unfused student. Marks: flips of each file. "
        f"Bars: margins that its allowed error can overturn; a flip beyond its bar fails. Flips: {counted}.",
    )


def file_names(data: dict[str, Any], evidence: Evidence) -> dict[str, str]:
    """A short name for each file of the task: its target, or that it is the ONNX file of one."""
    by_file: dict[str, str] = {}
    for each in target_facts(data, evidence):
        if each.results and not each.by_reference:
            by_file.setdefault(each.results, each.name)
    found = {}
    for name in () if evidence.record is None else evidence.record.files:
        parts = name.split("/")
        found[name] = by_file.get(name, f"{parts[1]}, ONNX file" if len(parts) == 3 else name)
    return found


def _number_tables(scores: Scores, data: dict[str, Any], evidence: Evidence, classes: tuple[str, ...]) -> list[Table]:
    return [_class_table(scores, data, evidence, classes), _mistakes_table(scores), _bins_table(scores)]


def _class_table(scores: Scores, data: dict[str, Any], evidence: Evidence, classes: tuple[str, ...]) -> Table:
    shown, names = main_file(evidence), file_names(data, evidence)
    others = [name for name in evidence.answers if name not in (shown, REFERENCE)]
    columns = [_recalls(name, evidence, len(classes)) for name in others]
    rows = []
    for index, each in enumerate(scores.classes):
        recall, interval = ("no images", "") if each.recall is None else _interval(each.recall).split("\n")
        precision = "" if each.precision is None else f"{each.precision:.2%}"
        rows.append(
            (each.name, f"{each.images:,}", recall, interval, precision, *(column[index] for column in columns))
        )
    header = (
        "class",
        "images",
        "recognised",
        "95 % interval",
        "precision",
        *(names.get(name, name) for name in others),
    )
    note = f"{shown}; the last columns are the share that other files recognise."
    return Table(title="Every class", header=header, rows=tuple(rows), note=note)


def _recalls(name: str, evidence: Evidence, count: int) -> list[str]:
    assert evidence.record is not None
    labels, predicted = evidence.record.reference.labels, evidence.answers[name].classes[:, 0]
    images = np.bincount(labels, minlength=count)
    right = np.bincount(labels[labels == predicted], minlength=count)
    return [f"{hit / total:.2%}" if total else "" for hit, total in zip(right, images, strict=True)]


def _mistakes_table(scores: Scores) -> Table:
    rows = tuple((true, said, f"{count:,}") for true, said, count in scores.most_confused(_SHOWN_MISTAKES))
    return Table(title="Most frequent mistakes", header=("class", "taken for", "images"), rows=rows)


def _bins_table(scores: Scores) -> Table:
    rows = tuple(
        (f"{each.low:.0%} to {each.high:.0%}", f"{each.images:,}", f"{each.confidence:.2%}", f"{each.accuracy:.2%}")
        for each in scores.bins
    )
    return Table(title="Calibration by bin", header=("probability", "images", "mean", "right"), rows=rows)


def _images(data: dict[str, Any], evidence: Evidence, classes: Sequence[str]) -> tuple[str, str, list[Thumbnail]]:
    """Heading, note and images of the section on flips; an empty heading where there is no record."""
    record = evidence.record
    if record is None:
        return "", "", []
    found, names = shown_images(record), file_names(data, evidence)
    flipped = any(each.changed for each in found)
    title = "Flips of the surest answers" if flipped else "No flips"
    note = (
        "Images for which a file gives another class than the unfused student, the largest margin first."
        if flipped
        else f"Every file gives the class of the unfused student for all {len(record.reference.labels):,} images. "
        "These are its closest decisions."
    )
    if not evidence.thumbnails:
        note += " The images are not shown: the bundle holds no image of the data set."
    return title, note, [_thumbnail(each, names, classes, evidence.thumbnails) for each in found]


def _thumbnail(each: Any, names: Mapping[str, str], classes: Sequence[str], sources: Mapping[int, str]) -> Thumbnail:
    def named(index: int) -> str:
        return classes[index] if index < len(classes) else f"class {index}"

    lines = [f"unfused: {named(each.predicted)}"]
    lines += [f"{names[name]}: {named(index)}" for name, index in each.changed.items()]
    lines += [f"margin {each.margin:.3g}", f"image {each.position:,}"]
    return Thumbnail(
        source=sources.get(each.position, ""),
        said=f"Image {each.position} of the validation split, class {named(each.label)}",
        label=f"true class: {named(each.label)}",
        lines=tuple(lines),
    )


def _student_plots(data: dict[str, Any]) -> list[Plot]:
    kinds = _merged_kinds(data)
    if not kinds:
        return []
    operators = {name: sum(counts.values()) for name, counts in data["operators"].items()}
    listed = "; ".join(f"{each.count} x {len(each.before)} path(s) to {each.after}" for each in kinds)
    return [
        Plot(
            title="The merge",
            svg=_drawn(figures.merge_picture, kinds),
            said=f"Layers before and after the merge: {listed}.",
            caption=f"{operators['unfused']:,} operators become {operators['fused']:,} in the ONNX graph. The merge is "
            f"exact: error {data['certificate']['whole_relative_error']:.1e} of the largest output, in float64.",
        )
    ]


def _merged_kinds(data: dict[str, Any]) -> list[MergedKind]:
    """The kinds of blocks of the certificate, most frequent first."""
    counts: dict[str, int] = {}
    for block in data["certificate"]["blocks"]:
        counts[block["kind"]] = counts.get(block["kind"], 0) + 1
    branches = data["student"].get("branches") or {}
    paths = branches.get("num_branches", 2) if isinstance(branches, Mapping) else 2
    number = min(max(paths, 1), _SHOWN_PATHS) if isinstance(paths, int) else 2
    found = []
    for kind, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_SHOWN_KINDS]:
        before: tuple[tuple[str, ...], ...]
        if kind == "parallel branches":
            before = (("convolution", "batch norm"),) * number
        elif kind.startswith("adapters"):
            before = (("1x1 adapter", kind.removeprefix("adapters into ")),) * number
        else:
            before = (tuple(part.strip() or "layer" for part in kind.split("+")[:4]),)
        found.append(
            MergedKind(count=count, before=before, after="convolution" if "class" not in kind else "classifier")
        )
    return found


def _student_table(data: dict[str, Any]) -> Table:
    metrics, certificate = data["provenance"].get("metrics", {}), data["certificate"]
    recipe = data["provenance"].get("recipe")
    described = recipe if isinstance(recipe, Mapping) else {}
    operators = {name: f"{sum(counts.values()):,}" for name, counts in data["operators"].items()}
    rows = [
        ("top-1 of the teacher", f"{metrics['teacher_top1']:.2%}" if "teacher_top1" in metrics else NOT_RECORDED),
        ("top-1 of the student after training", f"{metrics['top1']:.2%}" if "top1" in metrics else NOT_RECORDED),
        ("teacher", _named(described, "teacher")),
        ("method", _named(described, "distiller")),
        ("parameters as trained", f"{certificate['unfused_parameters']:,}"),
        ("parameters after the merge", f"{certificate['fused_parameters']:,}"),
        ("operators as trained, after the merge", f"{operators['unfused']}, {operators['fused']}"),
    ]
    if latency := data.get("latency"):
        ratio = f"{latency['ratio']:.3f} ({latency['low']:.3f} to {latency['high']:.3f}, 99 %)"
        rows.append(("latency after / before the merge", f"{ratio}: {latency['verdict']}"))
    return Table(title="Student and teacher", header=("what", "value"), rows=tuple(rows))


def _named(recipe: Mapping[str, Any], table: str) -> str:
    found = recipe.get(table)
    return str(found.get("name") or NOT_RECORDED) if isinstance(found, Mapping) else NOT_RECORDED


def _commands() -> str:
    lines = [
        ("kdexport doctor BUNDLE", "would this machine serve it, and give its labels?"),
        ("kdexport predict BUNDLE photo.jpg", "labels and probabilities"),
        ("kdexport serve BUNDLE", "HTTP on 127.0.0.1:8000; pip install 'kdexport[serve]'"),
        ("curl --data-binary @photo.jpg '127.0.0.1:8000/v1/classify?top=3'", ""),
        ("kdexport evaluate BUNDLE --data DIR", "accuracy on your own images"),
        ("kdexport verify BUNDLE", "every check of the certificate, again"),
    ]
    return "\n".join(f"{command:<40}  # {what}" if what else command for command, what in lines)


def _use(data: dict[str, Any]) -> list[tuple[str, str]]:
    preprocessing = Preprocessing.from_json(data["student"]["preprocessing"])
    size = preprocessing.image_size
    return [
        ("input", f"input (batch, 3, {size}, {size}) float32: RGB / 255, less {_triple(preprocessing.mean)}, divided "
         f"by {_triple(preprocessing.std)}; targets that take another input say so in manifest.json"),
        ("image", preprocessing.describe()),
        ("output", f"logits (batch, {len(data['student'].get('classes', ()))}) float32"),
        *served_elsewhere(data).items(),
        ("images inside", images_inside(data)),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(data["versions"].items()))),
    ]  # fmt: skip


def _triple(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
