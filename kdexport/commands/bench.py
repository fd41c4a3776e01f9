"""`kdexport bench`: the latency of a bundle, fused and unfused or by target."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kdexport.commands.options import Batch, Clock, Debug, Json, Plugins, Seed, Threads, parse_batches
from kdexport.core.console import new_console, print_answer


def bench(
    bundle: Annotated[Path, typer.Argument(help="A folder that `kdexport build` wrote.")],
    arms: Annotated[str, typer.Option(help="One or two of: fused, unfused, a target of the bundle.")] = "fused,unfused",
    clock: Clock = "host",
    batch: Batch = "1",
    target: Annotated[str | None, typer.Option(help="Target; default onnx-fp32.")] = None,
    threads: Threads = 1,
    sessions: Annotated[int, typer.Option(min=2, max=100, help="Number of sessions, each in a fresh process.")] = 6,
    seed: Seed = 0,
    bencher: Annotated[Path | None, typer.Option(help="Write JSON in the Bencher Metric Format.")] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a bundle: latency of each arm, their ratio with its interval, and p99 if there are enough runs."""
    from kdexport.core.files import require_writable_file, write_text
    from kdexport.core.progress import Reporter
    from kdexport.gate.bench_history import bencher_metrics
    from kdexport.gate.timings import BenchRequest, run_bench
    from kdexport.timing.clocks import parse_clocks

    request = BenchRequest(
        bundle=bundle, arms=tuple(word.strip() for word in arms.split(",")), clocks=parse_clocks(clock),
        batches=parse_batches(batch), target=target, threads=threads, sessions=sessions, seed=seed,
    )  # fmt: skip
    require_writable_file(bencher)
    with Reporter().stage("bench") as progress:
        data = run_bench(request, progress)
    if bencher is not None:
        write_text(bencher, f"{json.dumps(bencher_metrics(data), indent=1)}\n")
    if as_json:
        print_answer(data)
    else:
        _show(data)


def _show(data: dict[str, Any]) -> None:
    """Print the result as a table."""
    from kdexport.core.tables import Table, terminal_table

    console = new_console()
    arms = data["arms"]
    columns = [f"{arm} ms" for arm in arms] + (["ratio", "99 % interval"] if len(arms) == 2 else [])
    rows = []
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
        rows.append((row["clock"], str(row["batch"]), *cells, str(len(row["sessions"]))))
    header = ("clock", "batch", *columns, f"p99 of {arms[0]}, ms", "images/s", "sessions")
    console.print(terminal_table(Table(header=header, rows=tuple(rows))))
    machine = data["machine"]
    threads = data["latency"][0]["threads"]
    console.print(f"{data['bundle']}, {data['target']}, {threads} of {machine['cores']} processors, {machine['cpu']}")
