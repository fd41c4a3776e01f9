"""The clocks, and whether one of them can time a target on this machine."""

import importlib
from typing import Any

from kdexport.backends.base import Clock, Missing
from kdexport.backends.ort import CPU
from kdexport.errors import BackendUnavailableError, UnknownNameError
from kdexport.registry import nearest
from kdexport.targets import Target, parse_target, servable_targets

CLOCKS: tuple[Clock, ...] = ("host", "serve", "gpu")


def parse_clocks(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list such as ``host,serve``; duplicates are removed."""
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        if name not in CLOCKS:
            raise unknown_clock(name)
    return names


def unknown_clock(name: str) -> UnknownNameError:
    """The error for a name that is not one of ``CLOCKS``."""
    return UnknownNameError(f"There is no clock {name!r}.", remedy=nearest(name, CLOCKS))


def require_timeable(target: str, clock: str) -> None:
    """Raise ``BackendUnavailableError`` if ``clock`` cannot time ``target`` in its own precision on this machine."""
    wanted = parse_target(target)
    missing = {"host": _on_host, "serve": _over_http, "gpu": _on_gpu}[clock](wanted)
    if missing is not None:
        raise BackendUnavailableError(
            f"The clock {clock} cannot time {target}: {missing.reason}.", remedy=f"{missing.remedy}."
        )


def _on_host(target: Target) -> Missing | None:
    return target.runtime.not_timed_on(target.precision, "host")


def _over_http(target: Target) -> Missing | None:
    names = servable_targets(CPU)
    if str(target) in names:
        return None
    return Missing(
        f"`kdexport serve` runs only {' or '.join(names)} on a CPU", "Pass --clock host, or one of these with --target"
    )


def _on_gpu(target: Target) -> Missing | None:
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return Missing("no CUDA device was found", "Pass --clock host or --clock serve")
    return target.runtime.not_timed_on(target.precision, "gpu")
