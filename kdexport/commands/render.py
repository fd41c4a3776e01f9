"""Results on a terminal: tables on stdout, also readable in a pipe."""

import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdexport.bundle.manifest import Manifest
from kdexport.core.console import new_console, verdict_style
from kdexport.core.tables import Table, terminal_table
from kdexport.report.check_tables import (
    RUNGS,
    beyond_checks,
    failed_checks,
    golden_sentence,
    hazard_rows,
    plan_tables,
    rung_rows,
    verdict_sentence,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from kdexport.bundle.signature import Signer
    from kdexport.bundle.slim_form import SlimBundle
    from kdexport.diagnose.environment import Fact
    from kdexport.pipeline import BuildResult
    from kdexport.verify.policy import Change
    from kdexport.verify.rebuilt_files import RebuiltFile
    from kdexport.verify.verdict import TargetRun, Verdict

#: Warnings that a terminal shows; the report has all.
_SHOWN_HAZARDS = 3


def show_build(result: "BuildResult") -> None:
    """What ``kdexport build`` prints: the bundle's tables, its verdict and what to type next."""
    console, data = new_console(), result.manifest.data
    if result.up_to_date:
        console.print("Nothing to do: the bundle is up to date.")
    _print_build(console, data)
    console.print(f"Verdict: {verdict_sentence(data)}.", style=_style(data), soft_wrap=True)
    console.print(f"Bundle:  {result.out}  (report.html, report.md)", soft_wrap=True)
    console.print(f"Next:    {_program()} verify {result.out}{_plugin_options()}", soft_wrap=True)
    console.print(f"         {_program()} inspect {result.out}", soft_wrap=True)


def _style(data: dict[str, Any]) -> str:
    return verdict_style(1 if failed_checks(data) else 3 if beyond_checks(data) else 0)


def _plugin_options() -> str:
    from kdexport.plugins import active_plugins

    return "".join(f" --plugin {source}" for source in active_plugins())


def _program() -> str:
    """How to type this command: its name if that is on PATH, else its path or its module."""
    if shutil.which("kdexport"):
        return "kdexport"
    if Path(sys.argv[0]).name == "__main__.py":
        return f"{Path(sys.executable).name} -m kdexport"
    near = os.path.relpath(sys.argv[0])
    return sys.argv[0] if near.startswith("..") else near


def show_manifest(folder: Path, manifest: Manifest) -> None:
    """What ``kdexport inspect`` prints."""
    console, data, spec = new_console(), manifest.data, manifest.spec
    size = spec.preprocessing
    console.print(f"{folder}: {spec.student}, {spec.num_classes} classes, {size.image_size}x{size.image_size}")
    console.print(
        f"Input   float32 (batch, 3, {size.image_size}, {size.image_size}), RGB / 255, mean {size.mean}, std {size.std}"
    )
    console.print(f"Image   {size.describe()}", soft_wrap=True)
    console.print(f"Classes {', '.join(spec.classes[:8])}{', ...' if spec.num_classes > 8 else ''}")
    _print_build(console, data)
    console.print(
        f"Verdict at build time: {verdict_sentence(data)}. Run kdexport verify {folder} to check it again.",
        style=_style(data),
        soft_wrap=True,
    )


def show_verdict(
    folder: Path,
    manifest: Manifest,
    verdict: "Verdict",
    runs: "Sequence[TargetRun] | None" = None,
    looser: "Sequence[Change]" = (),
) -> None:
    """What ``kdexport verify`` prints: a row for each rung and file, what ran each target, and the verdict.

    ``looser`` are the limits of the bundle's own policy that are looser than the default ones.
    """
    console = new_console()
    data = {**manifest.data, "parity": [check.to_json() for check in verdict.checks], "latency": None}
    others = [check for check in verdict.checks if check.rung not in RUNGS and check.ran]
    held, absent = sum(check.holds for check in others), len(verdict.not_run)
    counted = f"{held} of {len(others)} hold" + (f", {absent} did not run" if absent else "")
    audit = ("audit", "files, graphs, golden images", counted, "", _word(held == len(others)))
    console.print(terminal_table(_rung_table(data, audit)))
    if runs:
        console.print()
        console.print(terminal_table(Table(header=("target", "in this verification", "by"), rows=_run_rows(runs))))
        console.print()
    not_run = None if runs is None else [str(run) for run in runs if run.state != "ran here"]
    for change in looser:
        console.print(f"The policy of the bundle is looser than the default: {change}.", soft_wrap=True)
    if not verdict.failures:
        keys = ", ".join(change.key for change in looser)
        limits = f"; limits looser than the default: {keys}" if looser else ""
        sentence = f"{verdict_sentence(data, not_run)}{limits}"
        end = "." if verdict.beyond else f": {folder} is the trained student."
        console.print(f"Verdict: {sentence}{end}", style=_style(data), soft_wrap=True)


def show_rebuilt(folder: Path, files: "Sequence[RebuiltFile]") -> None:
    """What ``kdexport replay`` prints: each file, whether the rebuilt one is the same, and what differs."""
    console = new_console()
    rows = tuple((file.name, file.outcome, file.fact) for file in files)
    console.print(terminal_table(Table(header=("file", "rebuilt", ""), rows=rows)))
    console.print()
    counts = Counter(file.outcome for file in files)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    console.print(f"{summary}: {len(files)} files of {folder}, rebuilt from its unfused student.", soft_wrap=True)


def show_signed(folder: Path, signer: "Signer") -> None:
    """What ``kdexport sign`` prints: by whom the bundle is signed now, and how to check it."""
    console = new_console()
    console.print(f"Signed {signer.files} files of {folder} by {signer}.", soft_wrap=True)
    trusted = "PUBLIC_KEY.pem" if signer.kind == "key" else "ROOT.pem"
    console.print(f"Check it: {_program()} verify {folder} --signature {trusted}", soft_wrap=True)


def show_slim(written: "SlimBundle") -> None:
    """What ``kdexport slim`` prints: the size before and after, and what was left out."""
    console = new_console()
    part = written.bytes / max(written.whole_bytes, 1)
    console.print(
        f"Written: {written.out}, {written.bytes:,} bytes, {part:.0%} of the {written.whole_bytes:,} of the bundle.",
        soft_wrap=True,
    )
    console.print(f"Left out: {', '.join(written.left_out)}", soft_wrap=True)


def show_signer(signer: "Signer") -> None:
    """Who signed a bundle, after the signature was checked."""
    new_console().print(f"Signature: {signer.files} files, by {signer}.", soft_wrap=True)


def _run_rows(runs: "Sequence[TargetRun]") -> tuple[tuple[str, ...], ...]:
    return tuple((run.target, run.state, run.facts) for run in runs)


def show_changes(changes: "Sequence[Change]") -> None:
    """The limits that a policy changes, and whether each is looser or stricter."""
    console = new_console()
    if not changes:
        console.print("The policy changes no limit.")
        return
    rows = tuple((c.key, f"{c.old}", f"{c.new}", "looser" if c.loosens else "stricter") for c in changes)
    console.print(terminal_table(Table(header=("limit", "at the build", "now", ""), rows=rows)))
    console.print()


def show_facts(facts: "list[Fact]") -> None:
    """What ``kdexport doctor`` prints."""
    rows = tuple(("ok" if fact.ok else "--", fact.what, fact.fact) for fact in facts)
    new_console().print(terminal_table(Table(header=("", "", ""), rows=rows)))


def _print_build(console: "Console", data: dict[str, Any]) -> None:
    for table in (_student_table(data), _rung_table(data), _target_table(data)):
        console.print(terminal_table(table))
        console.print()
    if said := golden_sentence(data):
        console.print(f"Golden images: {said}", soft_wrap=True)
        console.print()
    _print_plans(console, data)
    _print_hazards(console, data)


def _print_plans(console: "Console", data: dict[str, Any]) -> None:
    for table in plan_tables(data):
        console.print(table.title)
        console.print(terminal_table(table))
        console.print(table.note, soft_wrap=True)
        console.print()


def _print_hazards(console: "Console", data: dict[str, Any]) -> None:
    rows = hazard_rows(data)
    if not rows:
        return
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(kind for _, kind, _ in rows).items())
    console.print(f"Warnings: {kinds} (all in report.md)")
    for layer, kind, numbers in rows[:_SHOWN_HAZARDS]:
        console.print(f"  {layer}: {kind}: {numbers}", soft_wrap=True)
    console.print()


def _student_table(data: dict[str, Any]) -> Table:
    metrics, certificate, operators = data["provenance"].get("metrics", {}), data["certificate"], data["operators"]
    rows = []
    if "teacher_top1" in metrics:
        rows.append(("teacher top-1", f"{metrics['teacher_top1']:.2%}", "", ""))
    if "top1" in metrics:
        rows.append(("student top-1", f"{metrics['top1']:.2%}", "", ""))
    rows += [
        ("operators", str(sum(operators["unfused"].values())), str(sum(operators["fused"].values())), ""),
        ("parameters", f"{certificate['unfused_parameters']:,}", f"{certificate['fused_parameters']:,}", ""),
    ]
    latency = data["latency"]
    if latency is not None:
        interval = f"99 % interval {latency['low']:.3f} to {latency['high']:.3f}"
        ratio = f"ratio {latency['ratio']:.3f}, {interval}: {latency['verdict']}"
        rows.append(("latency", f"{latency['reference_ms']:.3f} ms", f"{latency['candidate_ms']:.3f} ms", ratio))
    return Table(header=("", "unfused", "fused", ""), rows=tuple(rows))


def _rung_table(data: dict[str, Any], *further: tuple[str, ...]) -> Table:
    return Table(header=("rung", "subject", "nearest to its limit", "allowed", ""), rows=(*rung_rows(data), *further))


def _target_table(data: dict[str, Any]) -> Table:
    rows = []
    for name, entry in data["targets"].items():
        which = "multiplying in" if entry["precision"] == "int8" else "all"
        kernels = f"{entry['kernels']}, {which} {entry['precision']}" if "kernels" in entry else ""
        rows.append((name, entry["status"], kernels))
    return Table(header=("target", "status", "kernels"), rows=tuple(rows))


def _word(holds: bool) -> str:
    return "holds" if holds else "FAILS"
