"""`kdexport gate`: compare a candidate with a baseline, with a verdict."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdexport.commands.options import (
    Batch,
    Clock,
    Debug,
    Json,
    Plugins,
    Seed,
    Threads,
    parse_batches,
    parse_on_inconclusive,
    parse_percentage,
)  # fmt: skip
from kdexport.core.console import new_console, print_answer, verdict_style

if TYPE_CHECKING:
    from rich.console import Console

    from kdexport.gate.result import GateResult

Images = Annotated[
    str | None,
    typer.Option(help="Validation images: folder or digits; default stored predictions or golden images."),
]
Against = Annotated[str | None, typer.Option(help="Target to compare with, of the baseline or else of the bundle.")]


def gate(
    bundle: Annotated[Path, typer.Argument(help="The candidate: a folder that `kdexport build` wrote.")],
    baseline: Annotated[
        Path | None,
        typer.Option(help="Bundle to compare with, timed again here; a file of `bench --json` can only warn."),
    ] = None,
    max_slowdown: Annotated[str, typer.Option(help="Allowed slowdown of the median.")] = "2%",
    max_flips: Annotated[str | None, typer.Option(help="Allowed fraction of changed predictions.")] = None,
    max_top1_drop: Annotated[str | None, typer.Option(help="Allowed drop of top-1.")] = None,
    max_slow_sessions: Annotated[
        str | None,
        typer.Option(help="Allowed fraction of slow sessions, each a process; takes more sessions."),
    ] = None,
    slow_session: Annotated[str, typer.Option(help="A session is slow if the candidate is slower by more.")] = "10%",
    slo_p99: Annotated[float | None, typer.Option(min=0.0, help="Limit of the p99 in milliseconds.")] = None,
    data: Images = None,
    clock: Clock = "host",
    batch: Batch = "1",
    target: Annotated[str | None, typer.Option(help="Target; default onnx-fp32.")] = None,
    against: Against = None,
    threads: Threads = 1,
    runner: Annotated[Path | None, typer.Option(help="Calibration; default runner.toml if it exists.")] = None,
    on_inconclusive: Annotated[str | None, typer.Option(help="warn: exit 0; fail: exit 1; default exit 3.")] = None,
    seed: Seed = 0,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown, for a job summary.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the paired ratios.")] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Is the candidate slower than the baseline, or fused slower than unfused? PASS 0, FAIL 1, INCONCLUSIVE 3."""
    from kdexport.core.progress import Reporter
    from kdexport.gate.compare import GateRequest, Limits, run_gate
    from kdexport.gate.summary import Files, require_files, write_files
    from kdexport.timing.clocks import parse_clocks

    files = Files(junit=junit, markdown=markdown, plot=plot)
    request = GateRequest(
        bundle=bundle,
        baseline=baseline,
        limits=Limits(
            slowdown=parse_percentage("--max-slowdown", max_slowdown),
            flips=_optional("--max-flips", max_flips),
            top1_drop=_optional("--max-top1-drop", max_top1_drop),
            p99_ms=slo_p99,
            slow_sessions=_optional("--max-slow-sessions", max_slow_sessions),
            slow_session=parse_percentage("--slow-session", slow_session),
        ),
        data=data, clocks=parse_clocks(clock), batches=parse_batches(batch), target=target, against=against,
        threads=threads, runner=runner, policy=parse_on_inconclusive(on_inconclusive), seed=seed,
    )  # fmt: skip
    require_files(files)
    reporter = Reporter()
    with reporter.stage("gate") as progress:
        result = run_gate(request, progress, reporter.say)
    write_files(result, files)
    if as_json:
        print_answer(result.to_json(), exit_code=result.exit_code)
    else:
        show(result, new_console())
    raise typer.Exit(result.exit_code)


def _optional(option: str, text: str | None) -> float | None:
    return None if text is None else parse_percentage(option, text)


def show(result: "GateResult", console: "Console") -> None:
    """Print the table of checks, the measurements, and the verdict with its reasons."""
    from kdexport.core.tables import terminal_table
    from kdexport.gate.summary import check_table, facts, sentence

    console.print(f"{result.question} {result.candidate} against {result.reference}", soft_wrap=True)
    console.print(terminal_table(check_table(result)))
    for line in facts(result):
        console.print(line, soft_wrap=True)
    console.print(f"Verdict: {sentence(result)}", style=_style(result), soft_wrap=True)


def _style(result: "GateResult") -> str:
    # A WARN exits with 0.
    return verdict_style(0 if result.verdict == "PASS" else 1 if result.verdict == "FAIL" else 3)
