"""The names and values of the server's metrics."""

import re

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
