"""Where a gate's result goes: stdout, and the files that were asked for."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from kdexport.gate.machine import Calibration
from kdexport.gate.options import require_writable_file, write_file
from kdexport.gate.pages import junit, markdown, plot, require_plots, show
from kdexport.gate.result import GateResult


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
    from kdexport.screen import _console

    show(result, _console())


def emit_calibration(calibration: Calibration, path: Path, *, as_json: bool) -> None:
    """Print what a machine can see."""
    if as_json:
        data = {"ok": True, "exit_code": 0, "runner": str(path), "smallest_slowdown": calibration.smallest_slowdown}
        sys.stdout.write(json.dumps({**data, **asdict(calibration)}) + "\n")
        return
    from kdexport.screen import _console, _table

    table = _table("", "")
    table.show_header = False
    table.add_row("equal arms differ between sessions by", f"{calibration.session_deviation:.2%} (one deviation)")
    table.add_row("smallest slowdown a gate can enforce", f"{calibration.smallest_slowdown:.1%}")
    counted = f"{calibration.false_fails} of {calibration.gates}, at most {calibration.false_fail_high:.0%} (95 %)"
    table.add_row(f"false FAILs at {calibration.max_slowdown:.1%}", counted)
    table.add_row("the same, gates drawn from these sessions", f"{calibration.resampled_false_fails:.2%}")
    table.add_row("without a verdict", f"{calibration.inconclusive} of {calibration.gates}")
    table.add_row("median time of a gate", f"{calibration.median_gate_seconds:.0f} s")
    table.add_row("sessions, load", f"{calibration.sessions}, {calibration.load:.1f}")
    console = _console()
    console.print(table)
    console.print(f"{calibration.model}, {calibration.clock}, {calibration.machine.cpu}", soft_wrap=True)
    console.print(f"Written: {path}", soft_wrap=True)
