"""The campaign's page, from records that were made up: every count on it can be checked by hand."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gate.py"


def record(condition: str, index: int, verdict: str, label: str = "Quiet", **rules: bool) -> dict[str, Any]:
    none = {"mean20": False, "mean": False, "mann_whitney": False, "double": False}
    rules_ = {"apart": {**none, **rules}, "together": none}
    return {
        "condition": condition, "replicate": index, "seconds": 10.0 + index, "rules": rules_, "verdict": verdict,
        "reason": "the machine is too noisy: ..." if verdict == "INCONCLUSIVE" else "", "sessions": 6, "ratio": 1.0,
        "deviation": 0.01, "log_ratios": [], "sentinels": [], "milliseconds": 0.5, "loadavg": 1.0, "label": label,
        "model": "net", "max_slowdown": 0.02,
        "machine": {"cpu": "CPU", "cores": 2, "system": "Linux", "onnxruntime": "1"},
    }  # fmt: skip


def test_the_page_counts_what_the_records_say(tmp_path: Path) -> None:
    records = [record("A/A", i, "PASS", mean20=i < 2, mann_whitney=i < 1) for i in range(4)]
    records += [
        record("A/A", 4, "INCONCLUSIVE"),
        record("+10 %", 0, "FAIL", mean=True),
        record("A/A", 0, "FAIL", "Busy"),
    ]
    lines = [json.dumps(item) for item in records]
    # The last line was cut off by a kill.
    (tmp_path / "gate.jsonl").write_text("\n".join([*lines, lines[0][:40]]))
    command = [sys.executable, str(SCRIPT), "report", str(tmp_path / "gate.jsonl"), "--out", str(tmp_path / "gate.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    quiet, loaded = (tmp_path / "gate.md").read_text().split("## Busy\n")
    # 1 - 0.05^(1/5) is the exact upper bound of 0 of 5.
    assert "| A/A | 0 of 5: 0.0% (0.0% to 45.1%) | 4 | 1, 1 by the sentinel | 6 | 12.0 | 1.00% | 1.0 to 1.0 |" in quiet
    assert "| +10 % | 1 of 1: 100.0% (5.0% to 100.0%) | 0 |" in quiet
    assert "| this gate | 0 of 5: 0.0% (0.0% to 45.1%) | 1 of 1:" in quiet
    assert "| mean ratio > 1.05, 20 runs each, apart | 2 of 5: 40.0%" in quiet
    assert "| Mann-Whitney p < 0.05, all runs, apart | 1 of 5: 20.0%" in quiet
    assert "| Mann-Whitney p < 0.05, all runs, together | 0 of 5: 0.0%" in quiet
    assert "| A/A | 1 of 1: 100.0%" in loaded
    assert "+10 %" not in loaded
