"""Traces by OpenTelemetry: one span for each request, as part of the client's trace if it sends a traceparent."""

import importlib.util
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp

from kdexport import __version__
from kdexport.errors import BackendUnavailableError

_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http", "opentelemetry.instrumentation.asgi")
#: Probes would be most of the traces.
_LEFT_OUT = "/v2/health/live,/v2/health/ready"


def require_tracing() -> None:
    """Raise ``BackendUnavailableError`` if a package of OpenTelemetry is not installed."""
    if not all(map(_found, _PACKAGES)):
        raise BackendUnavailableError(
            "Traces need OpenTelemetry, which is not installed.", remedy="Run pip install 'kdexport[otel]'."
        )


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    # The parent package is missing.
    except ModuleNotFoundError:
        return False


def traced(app: ASGIApp) -> tuple[ASGIApp, Callable[[], object]]:
    """``app`` with a span for each request, and what sends the last spans and ends the export.

    Where spans are sent, and how many, is set by OpenTelemetry's own environment variables, such as
    ``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_SERVICE_NAME`` and ``OTEL_TRACES_SAMPLER``.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # A name in the environment replaces this one.
    resource: Any = Resource({SERVICE_NAME: "kdexport", "service.version": __version__}).merge(_from_environment())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    wrapped: Any = OpenTelemetryMiddleware(
        app, tracer_provider=provider, excluded_urls=_LEFT_OUT, exclude_spans=["receive", "send"]
    )
    return wrapped, provider.shutdown


def _from_environment() -> Any:
    from opentelemetry.sdk.resources import OTELResourceDetector

    return OTELResourceDetector().detect()
