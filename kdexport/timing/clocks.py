"""The clocks that can time a target, and whether one can time a given target on this machine."""

import importlib
from typing import Any

from kdexport.backends.base import Clock, Missing
from kdexport.backends.ort import CPU
from kdexport.errors import BackendUnavailableError, UnknownNameError
from kdexport.registry import nearest
from kdexport.targets import Target, parse_target, servable_targets

CLOCKS: tuple[Clock, ...] = ("host", "serve", "gpu")


def parse_clocks(text: str) -> tuple[str, ...]:
    """``host,serve`` as clocks, each once."""
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        if name not in CLOCKS:
            raise UnknownNameError(f"There is no clock {name!r}.", remedy=nearest(name, CLOCKS))
    return names


def require_timeable(target: str, clock: str) -> None:
    """Raise ``BackendUnavailableError`` where ``clock`` cannot time ``target`` in its own precision here."""
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
        f"`kdexport serve` runs the {' or '.join(names)} of a bundle", "Pass --clock host, or such a --target"
    )


def _on_gpu(target: Target) -> Missing | None:
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return Missing("no CUDA device was found that could record events", "Use --clock host or --clock serve here")
    return target.runtime.not_timed_on(target.precision, "gpu")
