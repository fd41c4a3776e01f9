import pytest

from kdexport.report.check_tables import failed_checks, report_tables, rung_rows, verdict_sentence
from tests.kdexport.report.manifests import check, manifest, with_check, with_latency


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


def test_a_check_that_did_not_run_neither_holds_nor_fails() -> None:
    absent = check("audit", "targets/coreml-fp16/m", "execution", float("nan"), 0.0, holds=False, ran=False)
    data = with_check({**absent, "unit": "faults"})
    assert failed_checks(data) == []
    assert verdict_sentence(data) == "all 7 checks hold; 1 check did not run; not slower than the unfused student"
    failing = check("C", "half.onnx", "rms error", 4.0, 3.0)
    assert verdict_sentence({**data, "parity": [*data["parity"], failing]}) == "1 of 8 checks failed"
    rows = next(table for table in report_tables({**data, "hazards": []}) if table.title == "Checks").rows
    assert rows[-1][:5] == ("audit", "targets/coreml-fp16/m", "execution", "", "did not run")
