"""Tables of text: on a terminal and as Markdown."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A header and rows of text with the same number of cells; pages also show ``title`` and ``note``."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows)


#: Cells that are verdicts, with their colours on a terminal.
_VERDICTS = {
    "holds": "green", "verified": "green", "PASS": "green", "ok": "green",
    "FAILS": "bold red", "FAIL": "bold red", "different": "bold red",
    "WARN": "yellow", "INCONCLUSIVE": "yellow", "--": "yellow", "did not run": "yellow",
}  # fmt: skip


def terminal_table(table: Table) -> "RichTable":
    """Header and rows for ``rich``, in the style of all commands; a header of empty cells is not shown."""
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=None, pad_edge=False, header_style="bold", show_header=any(table.header))
    for column in table.header:
        shown.add_column(Text(column), overflow="fold")
    for row in table.rows:
        # Text, not strings: a console that reads markup would remove [brackets] from them.
        shown.add_row(*(Text(cell, style=_VERDICTS.get(cell.partition(",")[0], "")) for cell in row))
    return shown


def markdown_text(text: str) -> str:
    """``text`` escaped as one line of Markdown, also inside a cell."""
    # A line break or a separator would end the cell.
    return " ".join(html.escape(text, quote=False).replace("|", "/").split())


def markdown_table(table: Table) -> list[str]:
    """The lines of header and rows."""
    rows = [table.header, *(tuple(map(markdown_text, row)) for row in table.rows)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(table.header)}", *lines[1:]]


def markdown_page(title: str, tables: Sequence[Table]) -> str:
    """Headings, tables and notes."""
    lines = [f"# {title}", ""]
    for table in tables:
        lines += [f"## {table.title}", "", *markdown_table(table)]
        lines += ["", table.note, ""] if table.note else [""]
    return "\n".join(lines)
