import io
import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy import stats

from kdexport.commands.gate import show
from kdexport.errors import BackendUnavailableError
from kdexport.gate import summary
from kdexport.gate.accuracy import judge_accuracy
from kdexport.gate.result import Check, GateResult, accuracy_check, latency_check, slow_check, tail_check
from kdexport.gate.sequential_test import Outcome, Plan, run_sequential_test
from kdexport.gate.slow_sessions import SlowLimits, count_slow_sessions
from kdexport.stats.proportions import upper_bound
from kdexport.stats.sequential import LOOKS
from kdexport.timing.machine import Machine
from tests.kdexport.gate.drawn_sessions import machine, measurement

MACHINE = Machine(cpu="A & B <CPU>", cores=2, system="Linux x86_64", onnxruntime="1.31.1")


def trial(effect: float, deviation: float = 0.002, *, tails_ms: tuple[float, ...] = ()) -> tuple[Outcome, Plan]:
    plan = Plan(max_slowdown=0.02, tails=True)
    run, _ = machine(effect, deviation, tails_ms=tails_ms)
    return run_sequential_test([measurement()], plan, run=run)[0], plan


def result(effect: float, deviation: float = 0.002, **changes: Any) -> GateResult:
    outcome, plan = trial(effect, deviation)
    return GateResult(
        question="Is it slower?", candidate="new|<bundle>", reference="old", plan=plan, outcomes=(outcome,),
        checks=(latency_check(outcome, plan),), machine=MACHINE, seconds=12.3, **changes,
    )  # fmt: skip


UNDECIDED = math.log(1.02)


@pytest.mark.parametrize(
    ("effect", "policy", "verdict", "exit_code"),
    [
        (0.0, "exit", "PASS", 0),
        (0.2, "exit", "FAIL", 1),
        (0.2, "warn", "FAIL", 1),
        (UNDECIDED, "exit", "INCONCLUSIVE", 3),
        (UNDECIDED, "warn", "INCONCLUSIVE", 0),
        (UNDECIDED, "fail", "INCONCLUSIVE", 1),
    ],
)
def test_verdicts_and_exit_codes(effect: float, policy: Any, verdict: str, exit_code: int) -> None:
    found = result(effect, policy=policy)
    assert (found.verdict, found.exit_code) == (verdict, exit_code)
    assert found.to_json()["verdict"] == verdict


def test_the_worst_check_decides() -> None:
    base = result(0.0)
    words = [Check(name=v, verdict=v, measured="", allowed="", reason="") for v in ("PASS", "WARN", "INCONCLUSIVE")]
    assert replace(base, checks=tuple(words[:2])).verdict == "WARN"
    assert replace(base, checks=tuple(words[:2])).exit_code == 0
    assert replace(base, checks=tuple(words)).verdict == "INCONCLUSIVE"
    assert replace(base, checks=(*words, *result(0.2).checks)).verdict == "FAIL"


def test_json_is_strict_and_holds_what_the_verdict_rests_on() -> None:
    data = json.loads(json.dumps(result(0.2).to_json(), allow_nan=False))
    (row,) = data["latency"]
    assert (row["clock"], row["batch"], row["threads"], row["verdict"]) == ("host", 1, 1, "FAIL")
    assert row["low"] < row["ratio"] < row["high"]
    assert row["ratio"] == pytest.approx(math.exp(np.mean([s["log_ratio"] for s in row["sessions"]])))
    for session in row["sessions"]:
        assert math.log(np.median(session["ratios"])) == pytest.approx(session["log_ratio"], abs=1e-4)
        assert session["cpus"] == [1]
        assert session["load"] == [0.5, 1.5]
    assert data["machine"]["cpu"] == "A & B <CPU>"


@pytest.mark.parametrize(("effect", "sessions", "slow"), [(0.0, 6, 0), (0.2, 6, 6)])
def test_every_verdict_states_what_its_sessions_exclude(effect: float, sessions: int, slow: int) -> None:
    outcome, plan = trial(effect)
    (row,) = result(effect).to_json()["latency"]
    excludes = row["excludes"]
    assert (excludes["sessions"], excludes["slow"], excludes["ratio"]) == (sessions, slow, 1.02)
    share = 1 - 0.01 ** (1 / sessions) if slow == 0 else 1.0
    assert excludes["share"] == pytest.approx(share)
    stated = f"{slow} of {sessions} sessions were slower than 1.020x, which excludes at 99% confidence that more than"
    reason = latency_check(outcome, plan).reason
    assert f"{stated} {share:.1%} of processes are; a rarer slow state is not seen here" in reason
    assert "--max-slow-sessions" in reason
    assert "--max-slow-sessions" not in latency_check(outcome, plan, counted=True).reason
    assert stated in summary.sentence(result(effect))


def test_the_exclusion_is_wrong_in_as_few_gates_as_the_page_says() -> None:
    # A gate that may stop at any look is wrong at most as often as one that is wrong at one of them.
    worst = 0.0
    for share in np.linspace(0.01, 0.99, 400):
        counts, before, wrong = np.ones(1), 0, 0.0
        for look in LOOKS:
            counts = np.convolve(counts, stats.binom.pmf(np.arange(look - before + 1), look - before, share))
            bad = np.asarray([upper_bound(events, look, 0.99) < share for events in range(look + 1)])
            wrong += float(counts[bad].sum())
            counts, before = np.where(bad, 0.0, counts), look
        worst = max(worst, wrong)
    assert 0.015 < worst <= 0.023


def test_a_check_of_slow_sessions_is_a_line_and_a_part_of_the_json() -> None:
    outcome, plan = trial(0.0)
    run, _ = machine(0.0, 0.002)
    slow = count_slow_sessions(outcome, plan, SlowLimits(share=0.3, slowdown=0.1), run=run)
    check = slow_check(outcome, slow)
    assert (check.name, check.verdict, check.measured, check.allowed) == (
        "slow sessions on host, batch 1", "PASS", "0 of 16", "30.00% above 1.100x",
    )  # fmt: skip
    (row,) = json.loads(json.dumps(result(0.0, slow=(slow,)).to_json(), allow_nan=False))["latency"]
    assert len(row["slow_sessions"]["log_ratios"]) == 16
    assert result(0.0).to_json()["latency"][0]["slow_sessions"] is None


def test_a_machine_that_was_too_noisy_says_so_in_json() -> None:
    data = json.loads(json.dumps(result(0.0, 0.5).to_json(), allow_nan=False))
    assert data["verdict"] == "INCONCLUSIVE"
    assert "too noisy" in data["checks"][0]["reason"]
    assert len(data["latency"][0]["sentinels"]) == 5


@pytest.mark.parametrize(("effect", "word"), [(0.0, "PASS"), (0.2, "FAIL"), (UNDECIDED, "INCONCLUSIVE")])
def test_the_terminal_says_everything_on_its_lines(effect: float, word: str) -> None:
    screen = io.StringIO()
    console = Console(width=160, file=screen, highlight=False)
    show(result(effect), console)
    lines = screen.getvalue().splitlines()
    assert lines[0] == "Is it slower? new|<bundle> against old"
    assert lines[2].split()[0:3] == ["host,", "batch", "1"]
    assert lines[2].split()[-1] == word
    assert "load 0.5 to 1.5" in screen.getvalue()
    assert lines[-1].startswith(f"Verdict: {word} (exit ")


@pytest.mark.parametrize(
    ("effect", "policy", "kind", "counts"),
    [
        (0.0, "exit", None, ("0", "0", "0")),
        (0.2, "exit", "failure", ("1", "0", "0")),
        (UNDECIDED, "exit", "error", ("0", "1", "0")),
        (UNDECIDED, "warn", "skipped", ("0", "0", "1")),
        (UNDECIDED, "fail", "failure", ("1", "0", "0")),
    ],
)
def test_junit_is_what_ci_reads(effect: float, policy: Any, kind: str | None, counts: tuple[str, ...]) -> None:
    suite = ET.fromstring(summary.junit(result(effect, policy=policy)).encode())
    assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == counts
    assert suite.get("tests") == "1"
    (case,) = suite.findall("testcase")
    assert case.get("name") == "host, batch 1"
    assert [child.tag for child in case] == [*([kind] if kind else []), "system-out"]


def test_markdown_is_a_table_whatever_the_names_are() -> None:
    page = summary.markdown(result(0.2))
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5}
    assert "FAIL" in page.splitlines()[0]
    assert "A &amp; B &lt;CPU&gt;" in page


def test_a_plot_is_a_picture_also_where_nothing_was_timed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    full = result(0.0)
    nothing = replace(full, outcomes=(replace(full.outcomes[0], sessions=(), interval=None),))
    for name, found in (("fail", result(0.2)), ("nothing", nothing)):
        summary.plot(found, tmp_path / name)
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10


def test_a_plot_without_matplotlib_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError) as caught:
        summary.require_plots()
    assert (caught.value.exit_code, caught.value.remedy) == (
        4,
        "Run `pip install 'kdexport[plots]'`, or omit --plot.",
    )


def test_a_p99_counts_every_run_and_never_claims_more_than_they_prove() -> None:
    fast, slow = (1.0,) * 100, (1.0,) * 90 + (9.0,) * 10
    outcome, _ = trial(0.0, tails_ms=fast)
    # Six sessions of 100 runs.
    assert tail_check(outcome, 2.0).verdict == "PASS"
    assert "0 of 600 runs above 2 ms" in tail_check(outcome, 2.0).reason
    outcome, _ = trial(0.0, tails_ms=slow)
    check = tail_check(outcome, 2.0)
    assert (check.verdict, check.allowed) == ("FAIL", "2 ms")
    outcome, _ = trial(0.0, tails_ms=(1.0,) * 70)
    check = tail_check(outcome, 2.0)
    assert check.verdict == "INCONCLUSIVE"
    assert "a proof needs at least 459 runs" in check.reason
    assert "unbounded" in check.measured
    assert tail_check(replace(outcome, sessions=()), 2.0).verdict == "INCONCLUSIVE"


def test_accuracy_gates_count_flips_and_lost_answers() -> None:
    labels = np.arange(4000) % 5
    reference = labels.copy()
    reference[:400] = (labels[:400] + 1) % 5
    candidate = reference.copy()
    candidate[300:420] = (labels[300:420] + 2) % 5
    flips, drop = judge_accuracy(reference, candidate, labels, (0.05, 0.001), "set")
    # 300 to 399 are wrong either way, 400 to 419 are lost; all 120 are flips.
    assert flips.estimate.value == pytest.approx(120 / 4000)
    assert drop.estimate.value == pytest.approx(20 / 4000)
    assert flips.verdict == "PASS"
    assert drop.verdict == "FAIL"
    assert accuracy_check(drop).name == "top-1 drop, set"
    same = judge_accuracy(reference, reference, labels, (0.0001, None), "set")
    assert same[0].verdict == "INCONCLUSIVE"
    assert "a proof needs at least 29956 images, none of them changed" in same[0].reason
    assert judge_accuracy(reference, candidate, labels, (None, None), "set") == []
