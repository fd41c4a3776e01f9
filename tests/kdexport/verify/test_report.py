import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kdexport.verify.check import Check
from kdexport.verify.report import failed_checks, report_tables, rung_rows, verdict_sentence, write_reports

HOSTILE = '<b>bold</b> & "quoted" | piped\nsecond line <script>alert(1)</script>'


def check(rung: str, subject: str, name: str, measured: float, allowed: float, **changes: Any) -> dict[str, Any]:
    holds = changes.pop("holds", measured <= allowed)
    made = Check(
        rung=rung, subject=subject, name=name, holds=holds, measured=measured, allowed=allowed, unit="x", **changes
    )
    return made.to_json()


def manifest(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "student": {
            "student": "mobilenetv2",
            "preprocessing": {"image_size": 32, "resize": 36, "mean": [0.5] * 3, "std": [0.2] * 3, "fit": "crop"},
        },
        "provenance": {
            "metrics": {"top1": 0.7123, "teacher_top1": 0.745},
            "seed": 7,
            "dataset_sha256": "ab" * 32,
            "folder": "kept out",
        },
        "operators": {"unfused": {"Conv": 56, "Concat": 1}, "fused": {"Conv": 53}},
        "certificate": {
            "unfused_parameters": 1234567,
            "fused_parameters": 765432,
            "whole_relative_error": 3e-15,
            "limit": 1e-9,
            "blocks": [
                {"name": "small", "kind": "conv + batch norm", "relative_error": 1e-16},
                {"name": "large", "kind": "parallel branches", "relative_error": 9e-15},
            ],
        },
        "parity": [
            check("A", "student", "whole", 1e-15, 1e-9),
            check("B", "model.onnx", "rms error", 1.0, 2.0),
            check("B", "model.onnx", "max error", 3.5, 4.0, detail="worst input all 0"),
            check("C", "half.onnx", "rms error", 2.9, 3.0),
            check("C", "half.onnx", "largest activation", 12.0, 8188.0),
            check("audit", "model.onnx", "weights", 0.0, 0.0),
            check("run", "model.onnx", "same input twice", 0.0, 0.0),
        ],
        "parity_images": 64,
        "golden": ["golden/000.png", "golden/001.png"],
        "targets": {
            "onnx-fp32": {"precision": "fp32", "status": "verified"},
            "trt-rtx-fp16": {"precision": "fp16", "status": "verified", "kernels": 58, "version": "1.7"},
        },
        "latency": {
            "clock": "host: onnxruntime session.run on the CPU",
            "batch": 1,
            "threads": 1,
            "sessions": 6,
            "ratio": 0.913,
            "low": 0.9,
            "high": 0.926,
            "reference_ms": 2.0,
            "candidate_ms": 1.83,
            "max_slowdown": 0.02,
            "mde": 0.015,
            "verdict": "not slower",
        },
        "build_key": "f" * 64,
        "versions": {"torch": "2.15.0"},
    }
    return {**data, **changes}


def with_check(*checks: dict[str, Any]) -> dict[str, Any]:
    data = manifest()
    return {**data, "parity": [*data["parity"], *checks]}


def with_latency(verdict: str | None) -> dict[str, Any]:
    data = manifest()
    return {**data, "latency": None if verdict is None else {**data["latency"], "verdict": verdict}}


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
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))

    def text_in(self, tag: str) -> list[str]:
        return [text for stack, text in self.texts if tag in stack]


def pages(folder: Path, data: dict[str, Any]) -> tuple[Page, str, str]:
    write_reports(folder, data)
    source = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    return page, source, (folder / "report.md").read_text(encoding="utf-8")


def test_a_rung_is_shown_by_the_check_nearest_to_its_limit() -> None:
    assert rung_rows(manifest()) == [
        ("A", "student", "whole: 1e-15 x", "1e-09", "holds"),
        ("B", "model.onnx", "max error: 3.5 x", "4", "holds"),
        ("C", "half.onnx", "rms error: 2.9 x", "3", "holds"),
    ]


@pytest.mark.parametrize("measured", [0.5, 2.5, float("nan"), float("inf")])
def test_a_rung_that_fails_is_shown_by_what_fails(measured: float) -> None:
    # Even if its number is lower than that of a check that holds.
    failing = check("B", "model.onnx", "zz", measured, 2.0, holds=False)
    holding = check("B", "model.onnx", "last", 3.99, 4.0)
    row = next(row for row in rung_rows(with_check(failing, holding)) if row[0] == "B")
    text = f"{measured:.3g}" if measured < 3 else "not finite"
    assert row == ("B", "model.onnx", f"zz: {text} x", "2", "FAILS")


def test_files_of_one_rung_have_rows_of_their_own() -> None:
    rows = rung_rows(with_check(check("B", "engine", "rms error", 0.1, 2.0), check("run", "engine", "twice", 1, 0)))
    assert [row[:2] for row in rows] == [
        ("A", "student"),
        ("B", "model.onnx"),
        ("C", "half.onnx"),
        ("B", "engine"),
    ]


def test_the_sentence_of_a_bundle_that_holds() -> None:
    assert verdict_sentence(manifest()) == "all 7 checks hold; not slower than the unfused student"
    assert verdict_sentence(with_latency(None)) == "all 7 checks hold"


def test_the_sentence_of_a_failure_counts_and_says_nothing_else() -> None:
    data = with_check(check("C", "half.onnx", "rms error", 4.0, 3.0), check("B", "x", "n", float("nan"), 2.0))
    assert verdict_sentence(data) == "2 of 9 checks failed"
    assert [entry["subject"] for entry in failed_checks(data)] == ["half.onnx", "x"]


def test_the_sentence_of_an_unclear_and_of_a_slower_student() -> None:
    assert verdict_sentence(with_latency("inconclusive")) == "all 7 checks hold; latency inconclusive"
    assert verdict_sentence(with_latency("slower")) == "all 7 checks hold; slower than the unfused student"


def test_the_sentence_names_what_was_not_executed() -> None:
    data = manifest()
    for name in ("trt-rtx-fp16", "trt-fp16"):
        data["targets"][name] = {"precision": "fp16", "status": "built, not executed"}
    assert verdict_sentence(data).endswith("; trt-rtx-fp16, trt-fp16 built, not executed")


@pytest.mark.parametrize("data", [manifest(), with_latency(None)], ids=["whole", "without latency"])
def test_the_page_is_well_formed_and_stands_alone(tmp_path: Path, data: dict[str, Any]) -> None:
    page, source, _ = pages(tmp_path, data)
    assert page.tags.count("table") == len(report_tables(data))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onclick", "srcset"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|//|url\(|@import", source)
    assert "lang" in dict(page.attributes)


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
    assert len(blocks) == len(report_tables(data))
    for block, table in zip(blocks, report_tables(data), strict=True):
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
