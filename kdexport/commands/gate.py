"""``kdexport bench``, ``kdexport gate`` and ``kdexport calibrate-runner``.

Where a gate's result goes: stdout, and the files that were asked for.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kdexport.core.files import require_writable_file, write_file
from kdexport.gate.calibrate import Calibration
from kdexport.gate.result import GateResult
from kdexport.gate.summary import facts, junit, markdown, plot, require_plots, sentence

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

Debug = Annotated[bool, typer.Option("--debug", help="Print tracebacks of errors.")]

Clock = Annotated[str, typer.Option(help="host (session.run), serve (through the HTTP server), gpu; comma separated.")]

Batch = Annotated[str, typer.Option(help="Batch sizes, comma separated.")]

Threads = Annotated[int, typer.Option(min=1, help="onnxruntime threads, each held on a processor of its own.")]

Images = Annotated[
    str | None,
    typer.Option(help="Validation images, a folder or digits; default what both bundles remember, or golden."),
]

Against = Annotated[str | None, typer.Option(help="Target to compare with: of the baseline, else of the same bundle.")]

Seed = Annotated[int, typer.Option(min=0, help="Of the order in which arms and blocks run.")]


def bench(
    bundle: Annotated[Path, typer.Argument(help="A folder that `kdexport build` wrote.")],
    arms: Annotated[str, typer.Option(help="One or two of fused, unfused and the bundle's targets.")] = "fused,unfused",
    clock: Clock = "host",
    batch: Batch = "1",
    target: Annotated[str | None, typer.Option(help="Target; default onnx-fp32.")] = None,
    threads: Threads = 1,
    sessions: Annotated[int, typer.Option(min=2, max=100, help="Fresh processes.")] = 6,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a bundle: latency of each arm, their ratio with its interval, p99 where there are enough runs."""
    from kdexport.commands.options import parse_batches
    from kdexport.core.progress import Reporter
    from kdexport.gate.bench import BenchRequest, run_bench
    from kdexport.timing.session import parse_clocks

    request = BenchRequest(
        bundle=bundle, arms=tuple(word.strip() for word in arms.split(",")), clocks=parse_clocks(clock),
        batches=parse_batches(batch), target=target, threads=threads, sessions=sessions, seed=seed,
    )  # fmt: skip
    with Reporter().stage("bench") as progress:
        data = run_bench(request, progress)
    if as_json:
        sys.stdout.write(json.dumps(data) + "\n")
    else:
        show_bench(data)


def gate(
    bundle: Annotated[Path, typer.Argument(help="The candidate: a folder that `kdexport build` wrote.")],
    baseline: Annotated[
        Path | None,
        typer.Option(help="Bundle to compare with, timed here again; numbers of `bench --json` only warn."),
    ] = None,
    max_slowdown: Annotated[str, typer.Option(help="Allowed slowdown of the median.")] = "2%",
    max_flips: Annotated[str | None, typer.Option(help="Allowed share of images with another label.")] = None,
    max_top1_drop: Annotated[str | None, typer.Option(help="Allowed drop of top-1.")] = None,
    slo_p99: Annotated[float | None, typer.Option(min=0.0, help="Milliseconds that the p99 must stay below.")] = None,
    data: Images = None,
    clock: Clock = "host",
    batch: Batch = "1",
    target: Annotated[str | None, typer.Option(help="Target; default onnx-fp32.")] = None,
    against: Against = None,
    threads: Threads = 1,
    runner: Annotated[Path | None, typer.Option(help="Calibration; default runner.toml where there is one.")] = None,
    on_inconclusive: Annotated[str | None, typer.Option(help="warn: exit 0; fail: exit 1; default exit 3.")] = None,
    seed: Seed = 0,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown, for a job summary.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the paired ratios.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Is the candidate slower than the baseline, or fused slower than unfused? PASS 0, FAIL 1, INCONCLUSIVE 3."""
    from kdexport.commands.options import parse_batches, parse_policy, parse_share
    from kdexport.core.progress import Reporter
    from kdexport.gate.compare import GateRequest, Limits, run_gate
    from kdexport.timing.session import parse_clocks

    files = Files(junit=junit, markdown=markdown, plot=plot)
    request = GateRequest(
        bundle=bundle,
        baseline=baseline,
        limits=Limits(
            slowdown=parse_share("--max-slowdown", max_slowdown),
            flips=None if max_flips is None else parse_share("--max-flips", max_flips),
            top1_drop=None if max_top1_drop is None else parse_share("--max-top1-drop", max_top1_drop),
            p99_ms=slo_p99,
        ),
        data=data, clocks=parse_clocks(clock), batches=parse_batches(batch), target=target, against=against,
        threads=threads, runner=runner, policy=parse_policy(on_inconclusive), seed=seed,
    )  # fmt: skip
    require_files(files)
    with Reporter().stage("gate") as progress:
        result = run_gate(request, progress)
    emit(result, files, as_json=as_json)
    raise typer.Exit(result.exit_code)


def calibrate_runner(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; default a small network that is built in.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write what was seen.")] = Path("runner.toml"),
    gates: Annotated[int, typer.Option(min=1, max=1000, help="A/A gates to run.")] = 5,
    max_slowdown: Annotated[str, typer.Option(help="Limit of those gates.")] = "2%",
    clock: Annotated[str, typer.Option(help="host, serve or gpu.")] = "host",
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    threads: Threads = 1,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what this machine can see: A/A gates, deviation between sessions, smallest slowdown."""
    from kdexport.commands.options import parse_share
    from kdexport.core.progress import Reporter
    from kdexport.gate.calibrate import CalibrationRequest, run_calibration

    request = CalibrationRequest(
        bundle=bundle, out=out, gates=gates, max_slowdown=parse_share("--max-slowdown", max_slowdown), clock=clock,
        batch=batch, threads=threads, seed=seed,
    )  # fmt: skip
    with Reporter().stage("calibrate") as progress:
        calibration = run_calibration(request, progress)
    emit_calibration(calibration, out, as_json=as_json)


def show_bench(data: dict[str, Any]) -> None:
    """A table on stdout."""
    from kdexport.commands.render import new_console, new_table

    console = new_console()
    arms = data["arms"]
    columns = [f"{arm} ms" for arm in arms] + (["ratio", "99 % interval"] if len(arms) == 2 else [])
    table = new_table("clock", "batch", *columns, f"p99 of {arms[0]}, ms", "images/s", "sessions")
    for row in data["latency"]:
        p99 = row["p99_ms"]
        high = "unbounded" if p99["high"] is None else f"{p99['high']:.3f}"
        cells = [f"{row['candidate_ms']:.3f}"]
        if len(arms) == 2:
            interval = f"{row['low']:.3f} to {row['high']:.3f}"
            cells += [f"{row['reference_ms']:.3f}", f"{row['ratio']:.3f}", interval]
        cells += [
            f"{p99['estimate']:.3f}, {p99['low']:.3f} to {high}",
            f"{1e3 * row['batch'] / row['candidate_ms']:.0f}",
        ]
        table.add_row(row["clock"], str(row["batch"]), *cells, str(len(row["sessions"])))
    console.print(table)
    machine = data["machine"]
    threads = data["latency"][0]["threads"]
    console.print(f"{data['bundle']}, {data['target']}, {threads} of {machine['cores']} processors, {machine['cpu']}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Reports to write, None for none."""

    junit: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None


def require_files(files: Files) -> None:
    """Raise before anything is timed where one of them could not be written."""
    if files.plot is not None:
        require_plots()
    for path in (files.junit, files.markdown, files.plot):
        require_writable_file(path)


def emit(result: GateResult, files: Files, *, as_json: bool) -> None:
    """Print the result and write the files."""
    if files.junit is not None:
        write_file(files.junit, junit(result))
    if files.markdown is not None:
        write_file(files.markdown, markdown(result))
    if files.plot is not None:
        partial = files.plot.with_name(f".{files.plot.name}.partial")
        plot(result, partial)
        partial.replace(files.plot)
    if as_json:
        sys.stdout.write(json.dumps(result.to_json()) + "\n")
        return
    from kdexport.commands.render import new_console

    show(result, new_console())


def emit_calibration(calibration: Calibration, path: Path, *, as_json: bool) -> None:
    """Print what a machine can see."""
    if as_json:
        data = {"ok": True, "exit_code": 0, "runner": str(path), "smallest_slowdown": calibration.smallest_slowdown}
        sys.stdout.write(json.dumps({**data, **asdict(calibration)}) + "\n")
        return
    from kdexport.commands.render import new_console, new_table

    table = new_table("", "")
    table.show_header = False
    table.add_row("equal arms differ between sessions by", f"{calibration.session_deviation:.2%} (one deviation)")
    table.add_row("smallest slowdown a gate can enforce", f"{calibration.smallest_slowdown:.1%}")
    counted = f"{calibration.false_fails} of {calibration.gates}, at most {calibration.false_fail_high:.0%} (95 %)"
    table.add_row(f"false FAILs at {calibration.max_slowdown:.1%}", counted)
    table.add_row("the same, gates drawn from these sessions", f"{calibration.resampled_false_fails:.2%}")
    table.add_row("without a verdict", f"{calibration.inconclusive} of {calibration.gates}")
    table.add_row("median time of a gate", f"{calibration.median_gate_seconds:.0f} s")
    table.add_row("sessions, load", f"{calibration.sessions}, {calibration.load:.1f}")
    console = new_console()
    console.print(table)
    console.print(f"{calibration.model}, {calibration.clock}, {calibration.machine.cpu}", soft_wrap=True)
    console.print(f"Written: {path}", soft_wrap=True)


def show(result: GateResult, console: Console) -> None:
    """The table on a terminal, and below it the verdict with its reasons."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("check", "measured", "allowed", "verdict"):
        table.add_column(column, overflow="fold")
    for check in result.checks:
        table.add_row(check.name, check.measured, check.allowed, check.verdict)
    console.print(f"{result.question} {result.candidate} against {result.reference}", soft_wrap=True)
    console.print(table)
    for line in facts(result):
        console.print(line, soft_wrap=True)
    console.print(f"Verdict: {sentence(result)}", soft_wrap=True)
