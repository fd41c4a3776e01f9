import json
import re
from pathlib import Path
from typing import Any

import pytest

from kdexport.errors import ConfigError
from kdexport.gate.bench_history import bencher_metrics, history_html, history_tables, read_history
from tests.conftest import Command
from tests.kdexport.report.manifests import HOSTILE

#: What Bencher publishes of its format, in words of ours: names, measures, numbers.
MEASURE = {"value", "lower_value", "upper_value"}


def result(day: int, fused: float, **changes: Any) -> dict[str, Any]:
    """A result of `kdexport bench` with three sessions, whose unfused arm takes twice the time."""
    row = {
        "clock": "host", "batch": 4, "threads": 1, "candidate_ms": fused, "reference_ms": 2 * fused,
        "sessions": [
            {"candidate_ms": value, "reference_ms": 2 * value} for value in (0.9 * fused, fused, 1.3 * fused)
        ],
    }  # fmt: skip
    machine = {"cpu": "A CPU", "cores": 2, "system": "Linux x86_64", "onnxruntime": "1.31.1", "gpu": ""}
    return {
        "schema": "kdexport.bench/2", "student": "mobilenetv2", "target": "onnx-fp32", "variant": "fused",
        "arms": ["fused", "unfused"], "latency": [row], "machine": machine, "measured": f"2026-11-{day:02}T10:00:00Z",
        **changes,
    }  # fmt: skip


def stored(folder: Path, name: str, data: dict[str, Any], *, bare: bool = False) -> Path:
    path = folder / name
    path.write_text(json.dumps(data if bare else {"schema": "kdexport.answer/1", "result": data}))
    return path


def test_bencher_gets_nanoseconds_and_images_per_second_of_each_arm() -> None:
    found = bencher_metrics(result(1, 0.5))
    assert list(found) == [
        "mobilenetv2/fused onnx-fp32, host, batch 4, 1 thread",
        "mobilenetv2/unfused onnx-fp32, host, batch 4, 1 thread",
    ]
    fused, unfused = found.values()
    assert fused["latency"] == pytest.approx({"value": 500_000, "lower_value": 450_000, "upper_value": 650_000})
    # 4 images in 0.5 ms, and in 0.65 and 0.45 ms.
    assert fused["throughput"]["value"] == pytest.approx(8000)
    assert fused["throughput"]["lower_value"] == pytest.approx(4 / 0.65e-3)
    assert fused["throughput"]["upper_value"] == pytest.approx(4 / 0.45e-3)
    assert unfused["latency"]["value"] == pytest.approx(1_000_000)
    for measures in found.values():
        assert all(set(measure) == MEASURE for measure in measures.values())
        assert all(
            measure["lower_value"] <= measure["value"] <= measure["upper_value"] for measure in measures.values()
        )


def test_results_are_series_in_the_order_of_their_dates(tmp_path: Path) -> None:
    files = [
        stored(tmp_path, "b.json", result(9, 0.55)),
        stored(tmp_path, "a.json", result(2, 0.5), bare=True),
        stored(tmp_path, "c.json", result(3, 7.0, machine={**result(1, 1)["machine"], "cpu": "Another"})),
        stored(tmp_path, "d.json", result(4, 3.0, arms=["onnx-int8", "onnx-fp32"])),
    ]
    fused, _, other, *_ = sorted(read_history(files), key=lambda series: (len(series.points) == 1, series.arm))
    assert (fused.arm, fused.setting) == ("fused onnx-fp32", "mobilenetv2, host, batch 4, 1 thread")
    assert [(point.measured[:10], point.ms) for point in fused.points] == [("2026-11-02", 0.5), ("2026-11-09", 0.55)]
    assert {series.arm for series in read_history(files)} == {
        "fused onnx-fp32", "unfused onnx-fp32", "onnx-int8", "onnx-fp32",
    }  # fmt: skip
    assert len(other.points) == 1
    rows = next(table.rows for table in history_tables([fused]))
    assert [row[3] for row in rows] == ["+0.0%", "+10.0%"]
    assert rows[1][:3] == ("2026-11-09T10:00:00Z", "0.550 ms", "0.495 to 0.715")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": "kdexport.gate/1"}, "the schema must be"),
        ({"measured": None}, "does not say when"),
        ({"measured": "yesterday"}, "does not say when"),
        ({"machine": {}}, "KeyError: 'cpu'"),
        ({"latency": [{}]}, "KeyError"),
        ({"latency": [{**result(1, 1)["latency"][0], "candidate_ms": 99}]}, "not a median of its sessions"),
        ({"latency": [{**result(1, 1)["latency"][0], "sessions": []}]}, "not a median of its sessions"),
    ],
)
def test_another_file_is_refused_with_the_reason(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_history([stored(tmp_path, "x.json", {**result(1, 1.0), **changes})])


def test_the_command_shows_the_table_writes_the_page_and_answers_in_json(tmp_path: Path, here: Command) -> None:
    files = [stored(tmp_path, f"{day}.json", result(day, day / 10, student=HOSTILE)) for day in (3, 1)]
    page = tmp_path / "history.html"
    done = here("history", *files, "--html", page)
    assert done.exit_code == 0
    assert "+200.0%" in done.stdout
    source = page.read_text()
    assert "<svg" in source
    assert "<script" not in source
    assert source == history_html(read_history(files))
    series = here("history", *files, "--json").data["series"]
    assert [point["ms"] for point in series[0]["points"]] == [0.1, 0.3]
    refused = here("history", tmp_path / "none.json", "--json")
    assert (refused.exit_code, refused.error["code"]) == (2, "KDX100")
