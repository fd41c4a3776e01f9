"""Sums of metrics and statistics, computed from samples that are known."""

import math

from prometheus_client.parser import text_string_to_metric_families

from kdexport.serving.metrics import Metrics, ModelStatistics
from kdexport.serving.sums import summed_metrics, summed_statistics

TIMES = {"total": 5_000_000, "queue": 1_000, "input": 2_000, "infer": 3_000, "output": 4_000}


def counted(identity: str, requests: int) -> tuple[Metrics, ModelStatistics]:
    metrics = Metrics(identity)
    statistics = ModelStatistics(metrics, 'a"b\\ c', 1)
    for _ in range(requests):
        statistics.succeeded(2, 4, TIMES)
    return metrics, statistics


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_sample_is_the_sum_and_identities_stay() -> None:
    (one, statistics), (two, _) = counted("one", 3), counted("two", 5)
    statistics.failed("only here", 10)
    texts = [metrics.text().decode() for metrics in (one, two)]
    found, parts = samples(summed_metrics(texts)), [samples(text) for text in texts]
    for key in parts[0] | parts[1]:
        values = [part[key] for part in parts if key in part]
        if key[0] in ("process_start_time_seconds", "process_max_fds"):
            assert found[key] == min(values)
        else:
            assert math.isclose(found[key], sum(values)), key
    assert found["kdexport_server", (("id", "one"),)] == found["kdexport_server", (("id", "two"),)] == 1
    model = (("model", 'a"b\\ c'), ("version", "1"))
    assert found["nv_inference_count_total", model] == 16
    assert found["kdexport_request_duration_seconds_count", model] == 8
    assert found.keys() == parts[0].keys() | parts[1].keys()


def test_only_what_grows_is_kept_of_the_past() -> None:
    text = counted("one", 3)[0].text().decode()
    past = summed_metrics([text], growing=True)
    families = {family.name: family.type for family in text_string_to_metric_families(past)}
    assert set(families.values()) == {"counter", "histogram"}
    assert summed_metrics([past, ""]) == past
    twice, once = samples(summed_metrics([past, past])), samples(past)
    assert all(math.isclose(twice[key], 2 * value) for key, value in once.items())
    assert summed_metrics([]) == ""


def test_statistics_of_one_model_are_added_and_others_stay() -> None:
    (_, one), (_, two) = counted("one", 3), counted("two", 5)
    two.succeeded(1, 1, TIMES)
    other = ModelStatistics(Metrics("three"), "b", 2)
    first, second = one.to_json(), two.to_json()
    rows = summed_statistics([[first], [second, other.to_json()]])
    assert [row["name"] for row in rows] == ['a"b\\ c', "b"]
    assert rows[0]["inference_count"] == 3 * 2 + 5 * 2 + 1
    assert rows[0]["execution_count"] == first["execution_count"] + second["execution_count"]
    assert rows[0]["inference_stats"]["success"] == {"count": 9, "ns": 9 * TIMES["total"]}
    assert [(row["batch_size"], row["compute_infer"]["count"]) for row in rows[0]["batch_stats"]] == [(1, 1), (4, 8)]
    assert rows[0].keys() == first.keys()
    assert summed_statistics([[first]]) == [first]
