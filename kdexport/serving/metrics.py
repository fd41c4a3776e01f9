"""Prometheus metrics, with Triton's names if Triton has such a metric, so that its dashboards work unchanged."""

import re
import time
from bisect import bisect_left
from collections import Counter as Counter_
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kdexport.data.exif_and_alpha import ImageFacts

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SUFFIX = re.compile(rb"\b(nv_\w+?)_total\b")
_MODEL = ("model", "version")
#: The upper bounds of the latencies that are counted together, in seconds.
_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BOUNDS_NS = tuple(round(bound * 1e9) for bound in _BOUNDS)
#: The parts of the time of a request.
_PARTS = ("queue", "input", "infer", "output")


class Metrics:
    """All metrics of one server, in their own registry."""

    def __init__(self, identity: str) -> None:
        """``identity`` is that of the process, as health probes give it."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = _MODEL) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self.success = counter("nv_inference_request_success", "Requests answered with 200")
        self.failure = counter(
            "nv_inference_request_failure", "Requests answered with another status", (*_MODEL, "reason")
        )
        self.images = counter("nv_inference_count", "Images on which the model was run")
        self.runs = counter("nv_inference_exec_count", "Runs of the model")
        self.duration = counter("nv_inference_request_duration_us", "Microseconds from header to response")
        self.queue = counter("nv_inference_queue_duration_us", "Microseconds in the queue")
        self.input = counter("nv_inference_compute_input_duration_us", "Microseconds for reading and decoding inputs")
        self.infer = counter("nv_inference_compute_infer_duration_us", "Microseconds in the model")
        self.output = counter("nv_inference_compute_output_duration_us", "Microseconds for writing responses")
        self.pending = Gauge(
            "nv_inference_pending_request_count", "Requests in progress", _MODEL, registry=self.registry
        )
        #: The value of ``pending`` by model and version.
        self.in_progress: Counter_[tuple[str, str]] = Counter_()
        #: The statistics that add what they have counted before the metrics are read.
        self.sources: dict[tuple[str, str], ModelStatistics] = {}
        self.latency = Latencies()
        self.registry.register(self.latency)
        self.refused = counter("kdexport_refused_requests", "Requests refused before the model ran", ("reason",))
        self.not_finite = counter("kdexport_not_finite_outputs", "Requests for which a logit was NaN or infinite")
        self.uploads = counter(
            "kdexport_uploaded_images",
            "Images decoded, by EXIF orientation (1 is upright) and whether they have transparency",
            (*_MODEL, "orientation", "transparency"),
        )
        self.reloads = counter("kdexport_bundle_loads", "Bundles loaded or refused", ("outcome",))
        self.connections = Gauge("kdexport_connections", "Open connections", registry=self.registry)
        self.evicted = Counter(
            "kdexport_evicted_connections", "Idle connections closed in favour of newer ones", registry=self.registry
        )

        self.dropped_lines = Counter(
            "kdexport_dropped_log_lines", "Lines of the access log that waited too long", registry=self.registry
        )
        Gauge("kdexport_server", "1, with the identity of the process", ("id",), registry=self.registry).labels(
            identity
        ).set(1)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format; Triton's counters have no suffix ``_total``."""
        for statistics in self.sources.values():
            statistics.add_counted()
        for labels, count in self.in_progress.items():
            self.pending.labels(*labels).set(count)
        return _SUFFIX.sub(rb"\1", generate_latest(self.registry))


class Latencies(Collector):
    """The histogram of the time of requests. Counting one takes a fifth of the time of the library's own."""

    def __init__(self) -> None:
        #: By model and version: how many requests took up to each bound but longer than the one before it.
        self._counts: dict[tuple[str, str], list[int]] = {}
        self._sums_ns: Counter_[tuple[str, str]] = Counter_()

    def counts(self, labels: tuple[str, str]) -> list[int]:
        """The counts of a model and version, to which ``place_of`` says where a request is added."""
        return self._counts.setdefault(labels, [0] * (len(_BOUNDS) + 1))

    def add(self, labels: tuple[str, str], ns: int) -> None:
        """Add the time of requests whose places were counted."""
        self._sums_ns[labels] += ns

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The histogram, for the registry."""
        family = HistogramMetricFamily(
            "kdexport_request_duration_seconds", "Seconds from header to response, if the status is 200", labels=_MODEL
        )
        for labels, counts in self._counts.items():
            bounds = [*map(floatToGoString, _BOUNDS), "+Inf"]
            reached = list(zip(bounds, accumulate(counts), strict=True))
            family.add_metric(labels, reached, self._sums_ns[labels] / 1e9)
        yield family


def place_of(ns: int) -> int:
    """The index of the count of ``Latencies`` for a request that took this long."""
    return bisect_left(_BOUNDS_NS, ns)


@dataclass(slots=True)
class Durations:
    """A count of events and the sum of their nanoseconds, as in Triton's statistics."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Count ``count`` events that took ``ns`` in all."""
        self.count += count
        self.ns += ns

    def to_json(self) -> dict[str, int]:
        """``{"count": ..., "ns": ...}``."""
        return {"count": self.count, "ns": self.ns}


class ModelStatistics:
    """Counts and durations of one model version, for /stats and /metrics.

    Only ``uploaded`` may be called in other threads than that of the event loop.
    """

    def __init__(self, metrics: Metrics, name: str, version: int) -> None:
        self._labels = (name, str(version))
        self._metrics = metrics
        self._children = {
            name: getattr(metrics, name).labels(*self._labels)
            for name in ("success", "images", "runs", "duration", *_PARTS)
        }
        self._latencies = metrics.latency.counts(self._labels)
        self._uploads: dict[ImageFacts, Counter] = {}
        # What is not in the metrics yet: requests, images, runs, and nanoseconds in all and of each part.
        self._requests, self._images, self._runs = 0, 0, 0.0
        self._ns = [0] * (1 + len(_PARTS))
        metrics.in_progress[self._labels] += 0
        previous = metrics.sources.get(self._labels)
        if previous is not None:
            previous.add_counted()
        metrics.sources[self._labels] = self
        self.inferences = 0
        self.executions = 0.0
        self.last_ms = 0
        self.parts = {name: Durations() for name in ("success", "fail", *_PARTS)}
        self.by_batch: dict[int, Durations] = {}

    def succeeded(self, images: int, together: int, times_ns: dict[str, int]) -> None:
        """Count a request answered with 200; ``times_ns`` has total, queue, input, infer and output."""
        self.succeeded_together([images], together, [times_ns])

    def succeeded_together(self, images: Sequence[int], together: int, times_ns: Sequence[Mapping[str, int]]) -> None:
        """Count requests answered with 200 that shared a run of ``together`` images, each with its times."""
        self.last_ms = int(time.time() * 1000)
        # The counters of the library take ten times as long, so they are changed before they are read.
        self._requests += len(images)
        count = sum(images)
        self._images += count
        # Each of several requests that shared a run counts its part of it.
        self._runs += count / together
        ns, infer = self._ns, 0
        for times in times_ns:
            ns[0] += times["total"]
            ns[1] += times["queue"]
            ns[2] += times["input"]
            ns[3] += times["infer"]
            ns[4] += times["output"]
            infer += times["infer"]
            self._latencies[place_of(times["total"])] += 1
        if together not in self.by_batch:
            self.by_batch[together] = Durations()
        self.by_batch[together].add(infer, len(times_ns))
        # Those of a replaced bundle count its last requests, and nobody asks them again.
        if self._metrics.sources[self._labels] is not self:
            self.add_counted()

    def add_counted(self) -> None:
        """Add to the metrics what was counted since the last time."""
        requests, images, runs, (total, *parts) = self._requests, self._images, self._runs, self._ns
        if not requests:
            return
        self._requests, self._images, self._runs, self._ns = 0, 0, 0.0, [0] * len(self._ns)
        self.inferences += images
        self.executions += runs
        self.parts["success"].add(total, requests)
        for part, ns in zip(_PARTS, parts, strict=True):
            self.parts[part].add(ns, requests)
            self._children[part].inc(ns / 1000)
        self._children["success"].inc(requests)
        self._children["images"].inc(images)
        self._children["runs"].inc(runs)
        self._children["duration"].inc(total / 1000)
        self._metrics.latency.add(self._labels, total)

    def begin(self) -> None:
        """Count a request in progress, until ``end``."""
        self._metrics.in_progress[self._labels] += 1

    def end(self) -> None:
        """The request is no longer in progress."""
        self._metrics.in_progress[self._labels] -= 1

    @contextmanager
    def in_progress(self) -> Iterator[None]:
        """``begin`` and ``end`` around a block."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def uploaded(self, facts: ImageFacts) -> None:
        """Count a decoded image by what its file says of how it is shown."""
        child = self._uploads.get(facts)
        if child is None:
            transparency = "yes" if facts.transparency else "no"
            child = self._metrics.uploads.labels(*self._labels, str(facts.orientation), transparency)
            self._uploads[facts] = child
        child.inc()

    def failed(self, reason: str, total_ns: int) -> None:
        """Count a request answered with another status."""
        self.parts["fail"].add(total_ns)
        self._metrics.failure.labels(*self._labels, reason).inc()

    def to_json(self) -> dict[str, Any]:
        """The statistics in the form of Triton's."""
        self.add_counted()
        name, version = self._labels
        parts = {key: value.to_json() for key, value in self.parts.items()}
        zero = Durations().to_json()
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ms,
            "inference_count": self.inferences,
            "execution_count": round(self.executions),
            "inference_stats": {
                "success": parts["success"], "fail": parts["fail"], "queue": parts["queue"],
                "compute_input": parts["input"], "compute_infer": parts["infer"], "compute_output": parts["output"],
                "cache_hit": zero, "cache_miss": zero,
            },
            "batch_stats": [
                {"batch_size": size, "compute_input": zero, "compute_infer": spent.to_json(), "compute_output": zero}
                for size, spent in sorted(self.by_batch.items())
            ],
        }  # fmt: skip
