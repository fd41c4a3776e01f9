import copy
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kdexport.report.check_tables import report_tables
from kdexport.report.contents import Evidence
from kdexport.report.page import report_html, targets_table, write_reports
from kdexport.report.templates import STYLE
from tests.kdexport.report.manifests import HOSTILE, check, manifest, with_check, with_latency
from tests.kdexport.report.recorded_answers import Recorded, record_of


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return record_of(["ant", "bee", "cat"])


class Page(HTMLParser):
    """Text, tags and attributes of a page, and whether every tag was closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))

    def text_in(self, tag: str) -> list[str]:
        return [text for stack, text in self.texts if tag in stack]


def pages(folder: Path, data: dict[str, Any], evidence: Evidence | None = None) -> tuple[Page, str, str]:
    write_reports(folder, data, evidence)
    source = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    return page, source, (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("data", [manifest(), with_latency(None)], ids=["whole", "without latency"])
def test_the_page_is_well_formed_and_stands_alone(tmp_path: Path, data: dict[str, Any]) -> None:
    page, source, _ = pages(tmp_path, data)
    # The targets, and the student, beside the certificate.
    assert page.tags.count("table") == len(report_tables(data)) + 2
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "onclick", "srcset"} & {name for name, _ in page.attributes}
    assert all((value or "").startswith("#") for name, value in page.attributes if name == "href")
    assert not re.search(r"https?:|url\((?!#)|@import", source)
    assert "lang" in dict(page.attributes)


def test_every_id_is_there_once_and_every_reference_leads_to_one(recorded: Recorded, tmp_path: Path) -> None:
    page, source, _ = pages(tmp_path, recorded.data, recorded.evidence)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 20
    named = [value for name, value in page.attributes if name == "aria-labelledby"]
    assert {*named, *re.findall(r"url\(#([^)]+)\)", source), *re.findall(r'href="#([^"]+)"', source)} <= set(ids)


def test_a_screen_reader_finds_headings_in_order_headers_and_text_for_pictures(
    recorded: Recorded, tmp_path: Path
) -> None:
    page, _, _ = pages(tmp_path, recorded.data, recorded.evidence)
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    assert page.tags.count("img") == 3
    said = [value or "" for name, value in page.attributes if name in ("alt", "aria-label")]
    assert all(said)
    assert page.attributes.count(("role", "img")) == page.tags.count("svg") == 6
    # Plots have a text of their own instead of loose labels.
    assert page.attributes.count(("aria-hidden", "true")) == page.tags.count("svg")
    assert page.attributes.count(("scope", "col")) == page.tags.count("th") - page.attributes.count(("scope", "row"))


def test_the_page_is_the_same_bytes_each_time(recorded: Recorded) -> None:
    first = report_html(recorded.data, recorded.evidence)
    assert report_html(copy.deepcopy(recorded.data), recorded.evidence) == first


def test_the_first_table_has_size_latency_accuracy_and_flips_of_each_target(recorded: Recorded) -> None:
    reference, fp32, rtx = targets_table(recorded.data, recorded.evidence).rows
    assert reference[:5] == ("unfused student, as trained", "4.57 MB", "2.000 ms", "75.00%\n42.81% to 94.51%", "")
    assert fp32[:3] == ("onnx-fp32", "2.80 MB", "1.830 ms\n1.00 x onnx-fp32, 6 sessions")
    assert fp32[3:5] == ("75.00%\n42.81% to 94.51%", "0 of 12")
    assert rtx[:3] == ("trt-rtx-fp16", "1.5 kB", "not timed\nit did not run on this machine")
    assert rtx[3:5] == ("58.33%\n27.67% to 84.83%", "3 of 12")


def test_a_flip_is_shown_with_its_classes_its_margin_and_its_image(recorded: Recorded, tmp_path: Path) -> None:
    page, _, _ = pages(tmp_path, recorded.data, recorded.evidence)
    captions = "\n".join(page.text_in("figcaption"))
    for row in (2, 5, 11):
        assert f"image {7 * row}\n" in f"{captions}\n"
    assert captions.index("margin 1.1") < captions.index("margin 0.5") < captions.index("margin 0.2")
    assert "trt-rtx-fp16, ONNX file: " in captions
    assert {f"true class: {name}" for name in ("ant", "bee", "cat")} >= set(page.text_in("strong")) - {"PASS"}


def test_a_target_that_kdexport_does_not_serve_has_another_way(recorded: Recorded, tmp_path: Path) -> None:
    page, _, _ = pages(tmp_path, recorded.data, recorded.evidence)
    ways = dict(zip(page.text_in("dt"), page.text_in("dd"), strict=True))
    assert "Triton" in ways["trt-rtx-fp16"]
    assert "onnx-fp32" not in ways


def test_a_page_without_images_of_the_data_set_says_so(recorded: Recorded, tmp_path: Path) -> None:
    page, _, _ = pages(tmp_path, recorded.data, replace(recorded.evidence, thumbnails={}))
    assert "img" not in page.tags
    assert any("the bundle holds no image of the data set" in text for text in page.text_in("p"))


def test_a_bundle_of_an_earlier_version_says_what_it_did_not_record(recorded: Recorded, tmp_path: Path) -> None:
    data = {name: value for name, value in recorded.data.items() if name not in ("answers", "target_times")}
    page, source, markdown = pages(tmp_path, data, replace(recorded.evidence, answers={}, thumbnails={}))
    assert "not recorded in this bundle" in source
    # The calibration of all three, and the latency of the one that was not compared with the unfused student.
    assert page.text_in("span").count("not recorded") == 3 + 1
    assert "not recorded" in markdown


@pytest.mark.parametrize("width", [20, 400])
def test_classes_of_any_number_and_name_are_shown_as_text(width: int, tmp_path: Path) -> None:
    names = [HOSTILE, "$\\frac{1}{0}$", "$x", "\x00\x1b[31m", "\u202eright to left", "\u4e2d\u6587", "", "a" * 3000]
    names += [f"class {index}" for index in range(width - len(names))]
    given = record_of(names)
    page, source, _ = pages(tmp_path, given.data, given.evidence)
    assert not {"b", "script"} & set(page.tags)
    assert "<script" not in source
    assert HOSTILE in page.text_in("bdi")
    assert "$x" in page.text_in("bdi")


def test_the_page_shows_the_numbers_of_the_manifest(tmp_path: Path) -> None:
    page, _, markdown = pages(tmp_path, manifest())
    cells = page.text_in("td")
    for value in ("1,234,567", "765,432", "57", "0.913", "0.900 to 0.926", "f" * 64, "58", "worst input all 0"):
        assert value in cells
        assert value in markdown
    assert "kept out" not in markdown
    assert "Top-1 after the last epoch 71.23%, teacher 74.50%" in markdown
    # The worst block comes first, below the whole.
    assert cells.index("whole student") < cells.index("large") < cells.index("small")


@pytest.mark.parametrize("bad", [False, True])
def test_a_failure_is_marked_in_the_banner_and_in_its_row(tmp_path: Path, bad: bool) -> None:
    data = with_check(check("B", "x", "n", 9.0, 2.0)) if bad else manifest()
    page, _, markdown = pages(tmp_path, data)
    assert (("class", "verdict bad") in page.attributes) is bad
    assert page.attributes.count(("class", "bad")) == int(bad)
    assert markdown.count("FAILS") == int(bad)


def test_a_slower_student_has_no_green_banner(tmp_path: Path) -> None:
    assert ("class", "verdict bad") in pages(tmp_path, with_latency("slower"))[0].attributes
    assert ("class", "verdict") in pages(tmp_path, with_latency("inconclusive"))[0].attributes


def test_hostile_names_are_text_and_not_markup(tmp_path: Path) -> None:
    data = with_check(check("audit", HOSTILE, HOSTILE, 1.0, 0.0, detail=HOSTILE))
    data["student"]["student"] = HOSTILE
    data["targets"] = {HOSTILE: {"precision": HOSTILE, "status": HOSTILE, "version": HOSTILE}}
    data["certificate"]["blocks"].append({"name": HOSTILE, "kind": HOSTILE, "relative_error": 1.0})
    data["versions"] = {HOSTILE: HOSTILE}
    data["latency"]["clock"] = HOSTILE
    page, source, _ = pages(tmp_path, data)
    assert not {"b", "script"} & set(page.tags)
    assert "<script" not in source
    assert page.text_in("td").count(HOSTILE) >= 6
    assert HOSTILE in "".join(page.text_in("title"))


def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_header(tmp_path: Path) -> None:
    data = with_check(check("audit", HOSTILE, "a|b", 1.0, 0.0, detail=HOSTILE))
    data["targets"][HOSTILE] = {"precision": "fp16", "status": HOSTILE}
    _, _, markdown = pages(tmp_path, data)
    blocks = re.findall(r"(?:^\|.*\n?)+", markdown, re.MULTILINE)
    tables = [targets_table(data, Evidence()), *report_tables(data)]
    assert len(blocks) == len(tables)
    for block, table in zip(blocks, tables, strict=True):
        lines = block.splitlines()
        assert len(lines) == 2 + len(table.rows)
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(table.header) + 1}
        assert set(lines[1]) <= set("|-")


def test_writing_a_report_does_not_change_the_manifest(tmp_path: Path) -> None:
    data = manifest()
    before = copy.deepcopy(data)
    write_reports(tmp_path, data)
    assert data == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_a_statement_without_a_number_is_shown_without_one(tmp_path: Path) -> None:
    entry = {**check("audit", "model.onnx", "weights of the file", 1.0, 0.0, detail="layer conv1"), "unit": "faults"}
    rows = pages(tmp_path, with_check(entry))[2].splitlines()
    assert [row for row in rows if "weights of the file" in row] == [
        "| audit | model.onnx | weights of the file |  | FAILS | layer conv1 |"
    ]


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, as the Web Content Accessibility Guidelines define it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    shares = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_text_and_plots_have_enough_contrast_on_every_ground(theme: int) -> None:
    colours = [dict(re.findall(r"--([\w-]+):(#\w+)", rule)) for rule in re.findall(r":root\{(.*?)\}", STYLE, re.DOTALL)]
    found = colours[theme]

    def contrast(text: str, ground: str) -> float:
        lighter, darker = sorted((luminance(found[text]), luminance(found[ground])), reverse=True)
        return (lighter + 0.05) / (darker + 0.05)

    for ground in ("paper", "raised"):
        for text in ("ink", "muted", "bad", "second", "first"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    assert contrast("good", "good-paper") >= 4.5
    assert contrast("bad", "bad-paper") >= 4.5
    assert contrast("ink", "good-paper") >= 7
