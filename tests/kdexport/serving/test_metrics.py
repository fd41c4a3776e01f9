"""The names and values of the server's metrics."""

import re

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from kdexport.serving.metrics import Metrics, ModelStatistics


def test_metrics_have_tritons_names_without_a_suffix() -> None:
    metrics = Metrics("0123")
    statistics = ModelStatistics(metrics, "m", 3)
    times = {"total": 5_000_000, "queue": 1_000_000, "input": 500_000, "infer": 3_000_000, "output": 250_000}
    statistics.succeeded(2, 4, times)
    statistics.failed("queue", 1000)
    text = metrics.text().decode()
    for name, value in (
        ("nv_inference_request_success", 1), ("nv_inference_count", 2), ("nv_inference_exec_count", 0.5),
        ("nv_inference_request_duration_us", 5000), ("nv_inference_queue_duration_us", 1000),
        ("nv_inference_compute_input_duration_us", 500), ("nv_inference_compute_infer_duration_us", 3000),
        ("nv_inference_compute_output_duration_us", 250),
    ):  # fmt: skip
        assert f"# TYPE {name} counter\n" in text
        assert f'\n{name}{{model="m",version="3"}} {value:.1f}\n' in text
    assert 'nv_inference_request_failure{model="m",reason="queue",version="3"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert not re.search(r"nv_\w+_total", text)


def value(metrics: Metrics, name: str) -> float:
    (line,) = [line for line in metrics.text().decode().splitlines() if line.startswith(f'{name}{{model="m",')]
    return float(line.rpartition(" ")[2])


def test_many_runs_are_added_at_once_and_none_is_lost_when_a_bundle_is_replaced() -> None:
    metrics = Metrics("0123")
    old = ModelStatistics(metrics, "m", 3)
    times = {"total": 5000, "queue": 1000, "input": 500, "infer": 3000, "output": 250}
    for _ in range(250):
        old.succeeded_together([1, 2], 3, [times, times])
    assert value(metrics, "nv_inference_request_success") == 500
    assert value(metrics, "nv_inference_exec_count") == 250
    old.succeeded(1, 1, times)
    new = ModelStatistics(metrics, "m", 3)
    # The last request of the old bundle ends when the new one is served.
    old.succeeded(1, 1, times)
    new.succeeded(1, 1, times)
    assert value(metrics, "nv_inference_request_success") == 503
    assert value(metrics, "nv_inference_count") == 753
    counts = [statistics.to_json()["inference_stats"]["success"]["count"] for statistics in (old, new)]
    assert counts == [502, 1]
    assert new.to_json()["batch_stats"][0]["compute_infer"] == {"count": 1, "ns": 3000}


def test_requests_in_progress_are_those_of_the_old_and_the_new_bundle() -> None:
    metrics = Metrics("0123")
    old = ModelStatistics(metrics, "m", 3)
    with old.in_progress():
        new = ModelStatistics(metrics, "m", 3)
        new.begin()
        assert value(metrics, "nv_inference_pending_request_count") == 2
    assert value(metrics, "nv_inference_pending_request_count") == 1
    new.end()
    assert value(metrics, "nv_inference_pending_request_count") == 0


def test_latencies_are_the_histogram_of_the_library() -> None:
    registry = CollectorRegistry()
    bounds = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
    known = Histogram(
        "kdexport_request_duration_seconds", "Seconds from header to response, if the status is 200",
        ("model", "version"), registry=registry, buckets=bounds,
    )  # fmt: skip
    metrics = Metrics("0123")
    models = {version: ModelStatistics(metrics, "m", version) for version in (1, 2, 3)}
    edges = [round(bound * 1e9) + shift for bound in bounds for shift in (-1, 0, 1)]
    for version in models:
        known.labels("m", str(version))
    for place, ns in enumerate([0, 1, 10**12, *edges]):
        version = 1 + place % 2
        known.labels("m", str(version)).observe(ns / 1e9)
        models[version].succeeded(1, 1, dict.fromkeys(("total", "queue", "input", "infer", "output"), ns))
    text = metrics.text().decode()
    wanted = generate_latest(registry).decode().splitlines()
    found = [line for line in text.splitlines() if "kdexport_request_duration_seconds" in line]
    assert [line for line in found if "_sum" not in line] == [line for line in wanted if "_sum" not in line]
    sums = [[float(line.rpartition(" ")[2]) for line in lines if "_sum{" in line] for lines in (found, wanted)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-12)
