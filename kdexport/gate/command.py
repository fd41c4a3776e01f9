"""``kdexport bench``, ``kdexport gate`` and ``kdexport calibrate-runner``."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

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
    from kdexport.gate.bench import BenchRequest, run_bench, show_bench
    from kdexport.gate.options import parse_batches, parse_clocks
    from kdexport.reporter import Reporter

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
    from kdexport.gate.gate import GateRequest, Limits, run_gate
    from kdexport.gate.options import parse_batches, parse_clocks, parse_policy, parse_share
    from kdexport.gate.output import Files, emit, require_files
    from kdexport.reporter import Reporter

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
    from kdexport.gate.calibrate import CalibrationRequest, run_calibration
    from kdexport.gate.options import parse_share
    from kdexport.gate.output import emit_calibration
    from kdexport.reporter import Reporter

    request = CalibrationRequest(
        bundle=bundle, out=out, gates=gates, max_slowdown=parse_share("--max-slowdown", max_slowdown), clock=clock,
        batch=batch, threads=threads, seed=seed,
    )  # fmt: skip
    with Reporter().stage("calibrate") as progress:
        calibration = run_calibration(request, progress)
    emit_calibration(calibration, out, as_json=as_json)
