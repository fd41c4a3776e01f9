"""Tables as pages for people: Markdown, and HTML in one file."""

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, a header row, rows of text, and a sentence that says how to read it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def _one_line(cell: str) -> str:
    return " ".join(html.escape(cell, quote=False).replace("|", "/").split())


def markdown_page(title: str, tables: Sequence[Table]) -> str:
    """Headings, tables and notes."""
    lines = [f"# {title}", ""]
    for table in tables:
        lines += [f"## {table.title}", ""]
        lines += [f"| {' | '.join(table.header)} |", f"|{'---|' * len(table.header)}"]
        # A cell is one line without a separator, or the row falls apart.
        lines += [f"| {' | '.join(_one_line(cell) for cell in row)} |" for row in table.rows]
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
    """One self-contained page without a script; ``failed`` colours its verdict."""
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
