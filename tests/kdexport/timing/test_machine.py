import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kdexport.commands.options import parse_batches, parse_policy, parse_share
from kdexport.core.files import require_writable_file
from kdexport.errors import ConfigError, OutputError, ResolutionError, RunnerError, UnknownNameError
from kdexport.gate.calibrate import (
    MIN_SESSIONS,
    Calibration,
    calibrate,
    read_calibration,
    require_resolution,
    resampled_false_fails,
    write_calibration,
)
from kdexport.gate.sequential_test import Plan
from kdexport.stats.sequential import minimum_detectable_effect
from kdexport.timing.machine import require_cores, this_machine
from kdexport.timing.session import parse_clocks
from tests.kdexport.gate.drawn_sessions import FUSED, machine, number

PLAN = Plan(max_slowdown=0.02, seed=2)
SAME = replace(number(), reference=FUSED)


@pytest.fixture(scope="module")
def calm() -> Calibration:
    return calibrate(SAME, PLAN, 4, run=machine(0.0, 0.004)[0])


def test_a_calm_machine_is_calibrated_to_what_its_sessions_show(calm: Calibration) -> None:
    assert (calm.gates, calm.false_fails, calm.inconclusive) == (4, 0, 0)
    # Four gates of one sentinel and six sessions.
    assert calm.sessions == 28
    assert calm.session_deviation == pytest.approx(0.004, rel=0.3)
    assert calm.mde == pytest.approx(minimum_detectable_effect(calm.session_deviation))
    # 0 of 4: the exact bound is 1 - 0.05^(1/4).
    assert calm.false_fail_high == pytest.approx(1 - 0.05**0.25)
    assert calm.resampled_false_fails == 0
    assert calm.machine == this_machine()


def test_a_machine_without_a_verdict_is_measured_until_there_are_enough_sessions() -> None:
    found = calibrate(SAME, PLAN, 1, run=machine(0.0, 0.5)[0])
    assert found.sessions >= MIN_SESSIONS
    assert found.inconclusive == found.gates > 1
    assert found.mde > 0.3


def test_false_fails_drawn_from_sessions_depend_on_the_sessions() -> None:
    assert resampled_false_fails([0.001, -0.002, 0.003], math.log(1.02)) == 0
    # Far above the limit in either direction, every time: drawn with a random sign, some gates see one sign only.
    assert resampled_false_fails([0.3, 0.31, 0.29], math.log(1.02)) > 0.005


def test_runner_toml_survives_its_file_and_is_whole_or_not_there(calm: Calibration, tmp_path: Path) -> None:
    odd = replace(calm, model='a "quoted" \\ name\n\u00e9', machine=replace(calm.machine, cpu="CPU # 1 = fast"))
    write_calibration(odd, tmp_path / "runner.toml")
    assert read_calibration(tmp_path / "runner.toml") == odd
    assert [path.name for path in tmp_path.iterdir()] == ["runner.toml"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kdexport.runner/1", "kdexport.runner/9"),
        ("\nmde = ", "\nmde = nan\nx_mde = "),
        ("\nmde = ", "\nmde = '2%'\n#"),
        ("\nmde = ", "\n#"),
        ("\nmde = ", "\nmde = -1.0 #"),
        ("[machine]", "[machin]"),
        ("schema = ", "schema = = "),
    ],
)
def test_a_foreign_or_damaged_runner_toml_is_refused(calm: Calibration, tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "runner.toml"
    write_calibration(calm, path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError):
        read_calibration(path)


def test_a_limit_below_what_the_machine_sees_is_refused_with_what_it_sees(calm: Calibration) -> None:
    noisy = replace(calm, session_deviation=0.03, mde=0.0286)
    with pytest.raises(ResolutionError) as caught:
        require_resolution(noisy, 0.02)
    assert caught.value.exit_code == 3
    assert caught.value.message == (
        "This runner cannot enforce 2.0%: equal arms differ by 3.00% between sessions, so that it can enforce 3.0%."
    )
    # What the message offers must be accepted.
    require_resolution(noisy, noisy.smallest_slowdown)
    assert noisy.smallest_slowdown == 0.03
    require_resolution(calm, 0.02)


def test_more_threads_than_processors_are_refused() -> None:
    cores = len(os.sched_getaffinity(0))
    require_cores(cores)
    with pytest.raises(RunnerError) as caught:
        require_cores(cores + 1)
    assert caught.value.exit_code == 4
    assert f"this process may use {cores} processors" in caught.value.message


def test_this_machine_is_named() -> None:
    found = this_machine()
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.cpu
    assert found.onnxruntime[0].isdigit()


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), ("0.1%", 0.001), (" 100 %", 1.0), ("0.000001%", 1e-8)])
def test_shares_carry_their_sign(text: str, value: float) -> None:
    assert parse_share("--x", text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["2", "0.02", "0%", "-2%", "101%", "nan%", "2%%", "", "2 percent", "1e1%", "\u0662%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no share"):
        parse_share("--max-slowdown", text)


def test_lists_are_read_once_each_and_strictly() -> None:
    assert parse_batches("1, 8,1") == (1, 8)
    assert parse_clocks("serve,host,serve") == ("serve", "host")
    for text in ("", "1,,2", "0", "-1", "a", "1.5", "123456", "\u0661"):
        with pytest.raises(ConfigError):
            parse_batches(text)
    with pytest.raises(UnknownNameError, match="no clock 'hots'"):
        parse_clocks("hots")
    assert (parse_policy(None), parse_policy("warn"), parse_policy("fail")) == ("exit", "warn", "fail")
    with pytest.raises(UnknownNameError):
        parse_policy("exit")


def test_reports_that_could_not_be_written_are_refused_before_anything_runs(tmp_path: Path) -> None:
    require_writable_file(None)
    require_writable_file(tmp_path / "new.xml")
    for path in (tmp_path, tmp_path / "missing" / "new.xml"):
        with pytest.raises(OutputError):
            require_writable_file(path)
