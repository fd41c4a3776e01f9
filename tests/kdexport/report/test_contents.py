from dataclasses import replace

import numpy as np
import pytest

from kdexport.report.contents import (
    calibration_of,
    explained_margins,
    flip_margins,
    main_file,
    scores_of,
    shown_images,
    target_facts,
)
from tests.kdexport.report.recorded_answers import FLIPS, FP16, MODEL, Recorded, record_of


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return record_of(["ant", "bee", "cat"])


def test_flips_are_listed_from_the_largest_margin_down(recorded: Recorded) -> None:
    record = recorded.evidence.record
    assert record is not None
    found = shown_images(record)
    expected = sorted(FLIPS, key=lambda row: -FLIPS[row])
    assert [each.position for each in found] == [7 * row for row in expected]
    assert [each.margin for each in found] == pytest.approx([FLIPS[row] for row in expected], rel=1e-5)
    for each, row in zip(found, expected, strict=True):
        assert each.label == record.reference.labels[row]
        assert each.changed == {FP16: record.files[FP16].predictions[row]}
    assert len(shown_images(record, 2)) == 2
    assert sorted(flip_margins(record)[FP16].tolist()) == pytest.approx(sorted(FLIPS.values()), rel=1e-5)


def test_without_a_flip_the_closest_decisions_are_listed(recorded: Recorded) -> None:
    record = recorded.evidence.record
    assert record is not None
    found = shown_images(replace(record, files={MODEL: record.files[MODEL]}), 3)
    assert [each.position for each in found] == [77, 14, 35]
    assert not any(each.changed for each in found)


def test_the_margin_that_is_explained_is_twice_the_difference_that_the_policy_allows(recorded: Recorded) -> None:
    record = recorded.evidence.record
    assert record is not None
    # 4 units of rung B and of rung C by default, and the error of the reference itself.
    assert explained_margins(record, {})[FP16] == pytest.approx(2 * (4 * 1e-3 + 1e-6))
    looser = {"policy": {"C": {"max_error": 50.0}}}
    assert explained_margins(record, looser)[FP16] == pytest.approx(2 * (50 * 1e-3 + 1e-6))
    assert explained_margins(record, looser)[MODEL] == pytest.approx(2 * (4 * 1e-3 + 1e-6))


def test_a_target_that_did_not_run_has_the_accuracy_of_its_onnx_file(recorded: Recorded) -> None:
    fp32, rtx = target_facts(recorded.data, recorded.evidence)
    assert (fp32.results, fp32.by_reference, fp32.flips) == (MODEL, False, 0)
    assert (rtx.results, rtx.by_reference, rtx.flips) == (FP16, True, 3)
    record = recorded.evidence.record
    assert record is not None
    plan = "targets/trt-rtx-fp16/model.plan"
    ran = replace(record, files={**record.files, plan: record.files[MODEL]})
    data = {**recorded.data, "task": {**recorded.data["task"], "files": {**recorded.data["task"]["files"]}}}
    data["task"]["files"][plan] = data["task"]["files"][MODEL]
    _, rtx = target_facts(data, replace(recorded.evidence, record=ran))
    assert (rtx.results, rtx.by_reference, rtx.flips) == (plan, False, 0)


def test_scores_are_of_the_exported_model_and_none_without_finite_answers(recorded: Recorded) -> None:
    evidence = recorded.evidence
    assert main_file(evidence) == MODEL
    scores = scores_of(MODEL, evidence, ("ant", "bee", "cat"))
    assert scores is not None
    assert scores.top1.value == 0.75
    assert calibration_of(MODEL, evidence) == pytest.approx(scores.calibration_error.value)
    broken = replace(evidence.answers[MODEL], log_sum_exp=np.full(12, np.nan, np.float32))
    nothing = replace(evidence, answers={MODEL: broken})
    assert scores_of(MODEL, nothing, ("ant", "bee", "cat")) is None
    assert calibration_of(MODEL, nothing) is None
    assert main_file(replace(evidence, answers={})) == ""
