"""Experiment trackers (Weights & Biases, MLflow, ...) through accelerate, besides the files of a run."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from kdexport.errors import BackendUnavailableError, ConfigError
from kdexport.registry import nearest

#: TensorBoard's scalars are always written, into the folder of the run.
_OWN = ("tensorboard", "all")
_PACKAGES = {"comet_ml": "comet-ml"}


def require_trackers(names: Sequence[str]) -> None:
    """Raise ``ConfigError`` for a tracker that accelerate does not know, ``BackendUnavailableError`` without it."""
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS if str(name) not in _OWN]
    for name in names:
        if name in _OWN:
            raise ConfigError(
                f"train.trackers has {name!r}, but the scalars for TensorBoard are always in the folder of the run.",
                remedy=f"Remove it; known trackers: {', '.join(sorted(known))}.",
            )
        if name not in known:
            raise ConfigError(f"train.trackers has {name!r}, which is unknown.", remedy=nearest(name, known))
        if name not in [str(available) for available in get_available_trackers()]:
            raise BackendUnavailableError(
                f"train.trackers has {name!r}, whose package is not installed.",
                remedy=f"Run pip install {_PACKAGES.get(name, name)}, or remove it from train.trackers.",
            )


class Trackers:
    """One run in each tracker of ``names``, with ``described`` as its configuration; a context that ends them.

    A training that continues is a new run there, whose steps go on counting.
    """

    def __init__(self, names: Sequence[str], project: str, described: dict[str, Any]) -> None:
        require_trackers(names)
        self._trackers: list[GeneralTracker] = []
        self._names, self._project, self._described = tuple(names), project, described

    def __enter__(self) -> "Trackers":
        for name in self._names:
            tracker = LOGGER_TYPE_TO_CLASS[name](self._project)
            # Those of later versions of accelerate connect here.
            getattr(tracker, "start", lambda: None)()
            tracker.store_init_configuration(self._described)
            self._trackers.append(tracker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def log(self, metrics: dict[str, float], epoch: int) -> None:
        """Send the metrics of ``epoch`` (from 1)."""
        for tracker in self._trackers:
            tracker.log(dict(metrics), step=epoch)
