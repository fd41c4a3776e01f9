"""`kdexport history`: stored results of `kdexport bench`, in the order in which they were measured."""

from pathlib import Path
from typing import Annotated

import typer

from kdexport.commands.options import Debug, Json
from kdexport.core.console import new_console, print_answer


def history(
    files: Annotated[list[Path], typer.Argument(help="Results of kdexport bench BUNDLE --json.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with plots; needs the extra plots.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show latencies over time from stored results of bench; those of different machines are not mixed."""
    from kdexport.core.files import require_writable_file, write_text
    from kdexport.core.tables import terminal_table
    from kdexport.gate.bench_history import history_html, history_tables, read_history

    require_writable_file(html)
    found = read_history(files)
    if html is not None:
        write_text(html, history_html(found))
    if as_json:
        print_answer({"series": [series.to_json() for series in found]})
        return
    console = new_console()
    for table in history_tables(found):
        console.print(table.title, style="bold")
        console.print(table.note, soft_wrap=True)
        console.print(terminal_table(table))
        console.print()
