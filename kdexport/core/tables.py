"""Tables of text: on a terminal, as Markdown, and as one HTML file."""

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
    "WARN": "yellow", "INCONCLUSIVE": "yellow", "--": "yellow",
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


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c2330;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.verdict{padding:.6rem 1rem;border-radius:.4rem;background:#e5f4e9;border-left:.4rem solid #2b8a4b}
.verdict.bad{background:#fbe9e7;border-color:#c62f1f}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.25rem .7rem .25rem 0;border-bottom:1px solid #dfe3ea;vertical-align:top}
th{color:#5a6475;font-weight:600}td.bad{color:#c62f1f;font-weight:700}p{color:#5a6475;margin:.4rem 0}
@media(prefers-color-scheme:dark){body{background:#14181f;color:#dde3ec}th,p{color:#98a2b3}th,td{border-color:#2b3340}
.verdict{background:#16301f}.verdict.bad{background:#3a1a17}}
"""


def html_page(title: str, tables: Sequence[Table], *, failed: bool) -> str:
    """One self-contained page without scripts; ``failed`` selects the colour of its verdict."""
    parts = [_html_table(table) for table in tables]
    name, _, sentence = title.partition(": ")
    banner = f'<div class="verdict{" bad" if failed else ""}">{html.escape(sentence)}</div>'
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(name)}</h1>{banner}"
        f"{''.join(parts)}</html>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    body = "".join(
        "<tr>" + "".join(f"<td{_mark(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f"<h2>{html.escape(table.title)}</h2>{note}"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _mark(cell: str) -> str:
    return ' class="bad"' if cell == "FAILS" or cell.endswith(": FAILS") else ""
