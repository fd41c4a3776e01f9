from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdexport.students import STUDENTS
from training.__main__ import app
from training.study import architectures
from training.teachers import TEACHERS

PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"


def test_the_page_in_the_docs_is_what_the_command_writes_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A few networks instead of all, which take a minute; other tests check the facts of each network.
    monkeypatch.setattr(STUDENTS, "names", lambda: ["mobilenetv2"])
    monkeypatch.setattr(TEACHERS, "names", lambda: ["resnet32x4", "swin_t"])
    done = CliRunner().invoke(app, ["architectures", "--out", str(tmp_path / "page.md")])
    assert done.exit_code == 0
    written, kept = (tmp_path / "page.md").read_text().splitlines(), PAGE.read_text().splitlines()
    networks = ("| mobilenetv2 |", "| resnet32x4 |", "| swin_t |")
    assert written == [line for line in kept if not _is_network(line) or line.startswith(networks)]
    assert sum(map(_is_network, written)) == 5


def _is_network(line: str) -> bool:
    return line.startswith("| ") and not line.startswith("| name |")


def test_the_page_has_every_network_at_every_size_that_it_accepts() -> None:
    rows = [line.split(" | ")[:2] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    listed = {(name.removeprefix("| "), size) for name, size in rows}
    assert {(name, size) for name in STUDENTS.names() for size in ("32", "224")} <= listed
    assert {(name, "224") for name in TEACHERS.names()} <= listed
    assert ("swin_t", "32") not in listed


@pytest.mark.parametrize(
    ("name", "size", "parameters", "macs", "taps"),
    [
        ("shufflenetv1", 32, 949_258, 38.69, "24@32, 240@16, 480@8, 960@4"),
        ("mobilenetv2", 224, 2_351_972, 299.6, "32@112, 24@56, 32@28, 96@14, 320@7, 1280@7"),
    ],
)
def test_a_row_is_what_was_published(name: str, size: int, parameters: int, macs: float, taps: str) -> None:
    row = architectures.describe(STUDENTS.build(name, num_classes=100, image_size=size), name)
    assert (row.parameters, row.taps) == (parameters, taps)
    assert row.macs / 1e6 == pytest.approx(macs, abs=0.05)


def test_adapters_are_accepted_exactly_where_the_page_lists_them() -> None:
    net = STUDENTS.build("resnet18", num_classes=5, image_size=32)
    assert [tap.name for tap in net.taps if architectures.takes_adapters(net, tap.name)] == ["stage4"]
