import html

import pytest
from rich.console import Console

from kdexport.core.tables import Table, markdown_page, markdown_table, terminal_table

HOSTILE = "a|b <i>\n\n c & &lt; [red]d[/red]"
TABLE = Table(title="T", header=("name", ""), rows=((HOSTILE, "1"), ("", "FAILS")), note="How to read it.")


def shown(table: Table) -> list[str]:
    console = Console(width=100, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(terminal_table(table))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_terminal_shows_the_text_as_it_is() -> None:
    cell = " " * 24
    assert shown(TABLE) == ["name", "a|b <i>".ljust(24) + "1", "", " c & &lt; [red]d[/red]", cell + "FAILS"]


def test_a_header_of_empty_cells_is_not_shown_on_a_terminal() -> None:
    assert shown(Table(header=("", ""), rows=(("ok", "python"), ("--", "tensorrt")))) == ["ok  python", "--  tensorrt"]


def test_a_row_of_markdown_is_one_line_with_the_separators_of_its_header() -> None:
    header, rule, *rows = markdown_table(TABLE)
    assert (header, rule) == ("| name |  |", "|---|---|")
    assert rows == ["| a/b &lt;i&gt; c &amp; &amp;lt; [red]d[/red] | 1 |", "|  | FAILS |"]
    assert html.unescape(rows[0]) == "| a/b <i> c & &lt; [red]d[/red] | 1 |"


def test_a_page_has_each_heading_and_note_beside_its_table() -> None:
    bare = Table(title="U", header=("x",), rows=())
    assert markdown_page("Title", (TABLE, bare)) == "\n".join(
        ["# Title", "", "## T", "", *markdown_table(TABLE), "", "How to read it.", "", "## U", "", "| x |", "|---|", ""]
    )


def test_a_row_of_another_length_than_the_header_is_refused() -> None:
    with pytest.raises(AssertionError):
        Table(header=("a", "b"), rows=(("1",),))
