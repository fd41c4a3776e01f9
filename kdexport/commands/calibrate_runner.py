"""`kdexport calibrate-runner`: the smallest slowdown that this machine can enforce."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdexport.commands.options import Debug, Json, Plugins, Seed, Threads, parse_percentage
from kdexport.core.console import new_console, print_answer

if TYPE_CHECKING:
    from kdexport.gate.calibrate import Calibration


def calibrate_runner(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; default a small built-in network.")] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("runner.toml"),
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
    """Calibrate this machine with A/A gates: deviation between sessions, false FAILs, smallest enforceable slowdown."""
    from kdexport.core.progress import Reporter
    from kdexport.gate.calibrate import CalibrationRequest, run_calibration

    request = CalibrationRequest(
        bundle=bundle, out=out, gates=gates, max_slowdown=parse_percentage("--max-slowdown", max_slowdown), clock=clock,
        batch=batch, threads=threads, seed=seed,
    )  # fmt: skip
    with Reporter().stage("calibrate") as progress:
        calibration = run_calibration(request, progress)
    _show(calibration, out, as_json=as_json)


def _show(calibration: "Calibration", path: Path, *, as_json: bool) -> None:
    """Print the calibration."""
    if as_json:
        measured = {"smallest_slowdown": calibration.smallest_slowdown, **asdict(calibration)}
        print_answer({"runner": str(path), **measured})
        return
    from kdexport.core.tables import Table, terminal_table
    from kdexport.gate.calibrate import MAX_WIDENING

    false_fails = f"{calibration.false_fails} of {calibration.gates}, at most {calibration.false_fail_high:.0%} (95 %)"
    rows = (
        ("standard deviation between sessions", f"{calibration.session_deviation:.2%}"),
        ("correlation of consecutive sessions", f"{calibration.lag_correlation:.2f}"),
        ("intervals of a gate are wider by", f"{calibration.widening:.2f} times"),
        ("smallest slowdown that a gate can enforce", f"{calibration.smallest_slowdown:.1%}"),
        (f"false FAILs at {calibration.max_slowdown:.1%}", false_fails),
        ("the same, resampled from these sessions", f"{calibration.resampled_false_fails:.2%}"),
        ("inconclusive", f"{calibration.inconclusive} of {calibration.gates}"),
        ("median time of a gate", f"{calibration.median_gate_seconds:.0f} s"),
        ("sessions, load", f"{calibration.sessions}, {calibration.load:.1f}"),
    )
    console = new_console()
    console.print(terminal_table(Table(header=("", ""), rows=rows)))
    if calibration.widening > MAX_WIDENING:
        console.print(
            f"Sessions depend on each other: a gate refuses this calibration (up to {MAX_WIDENING:g} times allowed). "
            "Stop what else runs here and calibrate again.", soft_wrap=True,
        )  # fmt: skip
    console.print(f"{calibration.model}, {calibration.clock}, {calibration.machine.cpu}", soft_wrap=True)
    console.print(f"Written: {path}", soft_wrap=True)
