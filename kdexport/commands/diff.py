"""`kdexport diff`: two bundles beside each other, without running anything."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import new_console, print_answer

if TYPE_CHECKING:
    from kdexport.report.bundle_diff import BundleDiff


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A bundle, for example of the last release.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another bundle.")],
    html: Annotated[Path | None, typer.Option(help="Write a page; needs the extra plots.")] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what differs between two bundles: verdicts, size, latency, accuracy on the same images, classes, files.

    Differences are not failures: 0 if both could be compared, 1 if a file differs from its own manifest.
    """
    from kdexport.core.files import require_writable_file, write_text
    from kdexport.report.bundle_diff import diff_bundles

    require_writable_file(html)
    found = diff_bundles(a, b)
    if html is not None:
        from kdexport.report.page import diff_html

        write_text(html, diff_html(found))
    if as_json:
        print_answer(found.to_json())
    else:
        _show(found)


def _show(found: "BundleDiff") -> None:
    from kdexport.core.tables import terminal_table
    from kdexport.report.bundle_diff import diff_tables

    console = new_console()
    for table in diff_tables(found):
        console.print(table.title, style="bold")
        console.print(terminal_table(table))
        if table.note:
            console.print(table.note, soft_wrap=True)
        console.print()
    same = "Every file is the same." if found.same else f"{len(found.files)} files differ."
    console.print(same, soft_wrap=True)
