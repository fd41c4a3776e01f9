"""Fills a table: runs or continues each cell, and writes the page after every one, so that a stop loses none."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdexport.errors import StorageError
from training.cells import plan, read, run_cell
from training.record import write_whole
from training.table import to_csv, to_markdown


def tabulate(
    patterns: Sequence[str],
    out: Path,
    *,
    runs: Path,
    seeds: Sequence[int],
    overrides: dict[str, Any],
    title: str,
    run: bool,
) -> None:
    """Write ``out`` and a CSV beside it; raises ``ConfigError`` for unknown recipes and folders of other runs."""
    cells = plan(patterns, seeds, runs, overrides)
    command = shlex.join(["python", "-m", "training", *sys.argv[1:]])

    def write() -> None:
        results = [read(cell) for cell in cells]
        _replace(out, to_markdown(results, title=title, command=command))
        _replace(out.with_suffix(".csv"), to_csv(results))

    if not run:
        write()
        return
    from training.distil import distil
    from training.train import make_accelerator

    # Of several processes one writes; what cannot be written is told before hours of training.
    leads = make_accelerator(cells[0].recipe.train).is_main_process
    if leads:
        write()
    for cell in cells:
        run_cell(cell, runs, distil)
        if leads:
            write()


def _replace(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}.", remedy="Pass another --out.") from error
