"""The table of results of many runs: runs or continues its cells, and writes a page and a CSV."""

import csv
import io
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdexport.core.files import write_text
from kdexport.core.progress import Reporter
from kdexport.core.tables import Table, markdown_table
from kdexport.errors import StorageError
from training.study.cells import Result, plan, read, require_one_data_set, require_same_inputs, run_cell


def tabulate(
    patterns: Sequence[str],
    out: Path,
    *,
    runs: Path,
    seeds: Sequence[int],
    overrides: dict[str, Any],
    title: str,
    run: bool,
    parallel: int = 1,
) -> None:
    """Run or continue every cell if ``run``, and write the page ``out`` and a CSV after each of them.

    ``parallel`` cells train at once. Raises ``ConfigError`` for unknown recipes and folders of other runs,
    ``BackendUnavailableError`` for several at once without a GPU, ``StorageError`` if a file cannot be written.
    """
    cells = plan(patterns, seeds, runs, overrides)
    require_one_data_set(cells)
    command = shlex.join(["python", "-m", "training", *sys.argv[1:]])

    def write() -> None:
        results = [read(cell) for cell in cells]
        _replace(out, to_markdown(results, title=title, command=command))
        _replace(out.with_suffix(".csv"), to_csv(results))

    if not run:
        # Results of other images or weights than those that are named are not results of this table.
        if overrides.get("data", {}).get("root") or overrides.get("teacher", {}).get("checkpoint"):
            for cell in cells:
                require_same_inputs(cell, runs)
        write()
        return
    from training.runs.turns import CudaMemory
    from training.study.parallel import Together, require_parallel
    from training.train import distil, make_accelerator, process_settings

    accelerator = make_accelerator(cells[0].recipe.train)
    require_parallel(parallel, cells, accelerator)
    # One of several processes writes. It writes before the first run too: a wrong --out fails before hours of training.
    writes = accelerator.is_main_process
    if writes:
        write()
    if parallel > 1:
        together = Together(
            at_once=parallel,
            device=accelerator.device,
            distil=distil,
            process_settings=process_settings,
            written=write,
            say=Reporter().say,
            memory=CudaMemory(accelerator.device),
        )
        together.run(cells, runs)
        return
    for cell in cells:
        run_cell(cell, runs, distil)
        if writes:
            write()


def _replace(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror}.", remedy="Pass another --out.") from error


def to_csv(results: Sequence[Result]) -> str:
    """One line for each run; top-1 in percent, empty without a result."""
    stream = io.StringIO()
    rows = [_fields(result) for result in results]
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _fields(result: Result) -> dict[str, object]:
    cell, recipe = result.cell, result.cell.recipe
    return {
        "recipe": cell.name,
        "teacher": recipe.teacher.name,
        "student": recipe.student.name,
        "method": cell.method,
        "seed": cell.seed,
        "state": result.state,
        "epochs_done": result.epochs,
        "epochs": recipe.train.epochs,
        "published": _number(recipe.published.top1),
        "top1_last": _number(result.last),
        "top1_best": _number(result.best),
        "teacher_top1": _number(result.teacher),
        "device": result.device,
        "date": result.date,
        "commit": result.commit,
        "message": result.message,
    }


def to_markdown(results: Sequence[Result], *, title: str, command: str) -> str:
    """A page with a heading and a table for each pair, in the order of ``results``."""
    lines = [f"# {title}", "", f"    {command}", ""]
    lines += [
        "Top-1 in percent on the test split, mean over seeds \u00b1 standard deviation. The result is that of the last",
        "epoch; the best epoch was chosen on the test split and is shown because others report it. *Against plain* is",
        "the mean difference to the plain student of the same seed with its 95 % t interval. Published numbers come",
        "from other code, teachers and machines.",
        "",
    ]
    pairs = dict.fromkeys(result.cell.pair for result in results)
    for pair in pairs:
        lines += _pair(pair, [result for result in results if result.cell.pair == pair])
    return "\n".join(lines)


def _pair(pair: str, results: list[Result]) -> list[str]:
    published = next((r.cell.recipe.published for r in results if r.cell.recipe.published.teacher), None)
    measured = sorted({f"{result.teacher:.2f}" for result in results if result.teacher is not None})
    teacher = f"Teacher: {', '.join(measured) or 'not run'}"
    if published is not None:
        teacher += f" (published {published.teacher:.2f}, {published.source})"
    lines = [f"## {pair}", "", f"{teacher}.", ""]
    header = ("method", "published", "last epoch", "best epoch", "against plain", "seeds", "epochs", "device", "date")
    plain = {r.cell.seed: r.last for r in results if r.cell.method == "plain" and r.last is not None}
    methods = dict.fromkeys(result.cell.method for result in results)
    rows = [(method, *_row([r for r in results if r.cell.method == method], plain)) for method in methods]
    return [*lines, *markdown_table(Table(header=header, rows=tuple(rows))), ""]


def _row(row: list[Result], plain: dict[int, float]) -> list[str]:
    recipe = row[0].cell.recipe
    published = "" if recipe.published.top1 is None else f"{recipe.published.top1:.2f}"
    done = [result for result in row if result.state == "done"]
    if not done:
        return [published, _absence(row), "", "", "", "", "", ""]
    last = {result.cell.seed: result.last for result in done if result.last is not None}
    best = [result.best for result in done if result.best is not None]
    gains = [value - plain[seed] for seed, value in last.items() if seed in plain]
    own = row[0].cell.method == "plain"
    rest = "" if len(done) == len(row) else f" ({_absence([r for r in row if r.state != 'done'])})"
    return [
        published,
        spread(list(last.values())) + rest,
        spread(best),
        "" if own else interval(gains),
        str(len(done)),
        str(recipe.train.epochs),
        ", ".join(sorted({result.device for result in done})),
        max(result.date for result in done),
    ]


def _absence(row: list[Result]) -> str:
    failed = next((result for result in row if result.state == "failed"), None)
    if failed is not None:
        return f"failed, seed {failed.cell.seed}: {failed.message}"
    started = next((result for result in row if result.state == "unfinished"), None)
    if started is not None:
        return f"epoch {started.epochs} of {started.cell.recipe.train.epochs}, seed {started.cell.seed}"
    return "not run"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of percentages; only the mean for one value."""
    mean = math.fsum(values) / len(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} \u00b1 {_deviation(values):.2f}"


def interval(values: Sequence[float]) -> str:
    """The mean of differences with its 95 % t interval; without the interval for fewer than two values."""
    from scipy import stats

    if not values:
        return ""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:+.2f}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * _deviation(values) / math.sqrt(len(values))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def _deviation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
