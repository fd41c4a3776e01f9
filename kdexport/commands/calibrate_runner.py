"""`kdexport calibrate-runner`: what differences this machine can measure."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdexport.commands.options import Debug, Json, Plugins, Seed, Threads, parse_share
from kdexport.core.console import print_json

if TYPE_CHECKING:
    from kdexport.gate.calibrate import Calibration


def calibrate_runner(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; default a small network that is built in.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write what was seen.")] = Path("runner.toml"),
    gates: Annotated[int, typer.Option(min=1, max=1000, help="A/A gates to run.")] = 5,
    max_slowdown: Annotated[str, typer.Option(help="Limit of those gates.")] = "2%",
    clock: Annotated[str, typer.Option(help="host, serve or gpu.")] = "host",
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    threads: Threads = 1,
    seed: Seed = 0,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what this machine can see: A/A gates, deviation between sessions, smallest slowdown."""
    from kdexport.core.progress import Reporter
    from kdexport.gate.calibrate import CalibrationRequest, run_calibration

    request = CalibrationRequest(
        bundle=bundle, out=out, gates=gates, max_slowdown=parse_share("--max-slowdown", max_slowdown), clock=clock,
        batch=batch, threads=threads, seed=seed,
    )  # fmt: skip
    with Reporter().stage("calibrate") as progress:
        calibration = run_calibration(request, progress)
    _show(calibration, out, as_json=as_json)


def _show(calibration: "Calibration", path: Path, *, as_json: bool) -> None:
    """Print what a machine can see."""
    if as_json:
        data = {"ok": True, "exit_code": 0, "runner": str(path), "smallest_slowdown": calibration.smallest_slowdown}
        print_json({**data, **asdict(calibration)})
        return
    from kdexport.commands.render import new_console
    from kdexport.core.tables import Table, terminal_table

    counted = f"{calibration.false_fails} of {calibration.gates}, at most {calibration.false_fail_high:.0%} (95 %)"
    rows = (
        ("equal arms differ between sessions by", f"{calibration.session_deviation:.2%} (one deviation)"),
        ("smallest slowdown a gate can enforce", f"{calibration.smallest_slowdown:.1%}"),
        (f"false FAILs at {calibration.max_slowdown:.1%}", counted),
        ("the same, gates drawn from these sessions", f"{calibration.resampled_false_fails:.2%}"),
        ("without a verdict", f"{calibration.inconclusive} of {calibration.gates}"),
        ("median time of a gate", f"{calibration.median_gate_seconds:.0f} s"),
        ("sessions, load", f"{calibration.sessions}, {calibration.load:.1f}"),
    )
    console = new_console()
    console.print(terminal_table(Table(header=("", ""), rows=rows)))
    console.print(f"{calibration.model}, {calibration.clock}, {calibration.machine.cpu}", soft_wrap=True)
    console.print(f"Written: {path}", soft_wrap=True)
