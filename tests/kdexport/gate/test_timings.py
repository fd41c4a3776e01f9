"""A benchmark of two arms."""

from pathlib import Path

import pytest

from kdexport.errors import ConfigError
from kdexport.gate.timings import BenchRequest, run_bench
from tests.conftest import Built
from tests.kdexport.optional_packages import require_openvino


def test_two_targets_of_one_bundle_are_timed_each_in_its_runtime(two_targets: Path) -> None:
    require_openvino()
    request = BenchRequest(
        bundle=two_targets, arms=("openvino-fp32", "onnx-fp32"), clocks=("host",), batches=(1,), target=None, threads=1,
        sessions=2, seed=0,
    )  # fmt: skip
    data = run_bench(request, lambda _: None)
    (row,) = data["latency"]
    assert (data["target"], data["variant"], data["arms"]) == ("openvino-fp32", "fused", ["openvino-fp32", "onnx-fp32"])
    # One graph in two runtimes: neither a hundred times faster nor the same number.
    assert 0.01 < row["ratio"] < 100
    assert row["ratio"] != 1


@pytest.mark.parametrize("arms", [("fused", "fused"), ("fused", "onnx-fp32"), ("a", "b", "c")])
def test_a_bench_of_equal_arms_is_refused(arms: tuple[str, ...], built: Built) -> None:
    request = BenchRequest(
        bundle=built.bundle, arms=arms, clocks=("host",), batches=(1,), target=None, threads=1, sessions=2, seed=0
    )
    with pytest.raises(ConfigError, match="arms"):
        run_bench(request, lambda _: None)
