"""Plots of a run as PNG files: its learning curves, and how its branches differ. They need the extra ``plots``.

Figures do not use the global state of pyplot, and the same lines give the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdexport.errors import BackendUnavailableError, DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: One epoch: ``epoch`` (from 1) and values by name.
Line = Mapping[str, float]

_DPI = 90


def plot_learning_curves(
    lines: Sequence[Line], path: Path, *, title: str = "", teacher_top1: float | None = None
) -> None:
    """Plot losses, top-1 and learning rate over epochs, from the lines of metrics.jsonl.

    ``teacher_top1`` (a fraction) is a dashed line. Raises ``DataError`` without an epoch, ``BackendUnavailableError``
    without matplotlib.
    """
    figure, ((loss, top1, rate),) = _panels(lines, rows=1, columns=3, title=title)
    names = _names(lines)
    for name in (name for name in names if name.startswith("loss/")):
        _curve(loss, lines, name, name.removeprefix("loss/"))
    loss.set(ylabel="weighted loss", yscale=_scale(lines, [name for name in names if name.startswith("loss/")]))
    _curve(top1, lines, "top1", "student", lambda share: 100 * share)
    if teacher_top1 is not None:
        top1.axhline(100 * teacher_top1, color="0.4", linestyle="--", label=f"teacher {teacher_top1:.2%}")
    top1.set(ylabel="top-1, test (%)")
    _curve(rate, lines, "lr", "")
    rate.set(ylabel="learning rate", yscale=_scale(lines, ["lr"]))
    _finish(figure, path, (loss, top1))


def plot_diversity(lines: Sequence[Line], path: Path, *, title: str = "") -> None:
    """Plot the diversity of the branches of each layer over epochs, from the lines of diversity.jsonl.

    Columns are the correlations (their mean over pairs, in a band from the least to the largest), the squared errors of
    the branches and of their mean, and the share of each branch in the loss. Raises ``DataError`` without a layer,
    ``BackendUnavailableError`` without matplotlib.
    """
    names = _names(lines)
    layers = [name.removesuffix("/ambiguity") for name in names if name.endswith("/ambiguity")]
    if not layers:
        raise DataError(
            f"None of the {len(lines)} lines has the diversity of a layer.",
            remedy="Pass the diversity.jsonl of a run with branches.",
        )
    figure, rows = _panels(lines, rows=len(layers), columns=3, title=title)
    for layer, (correlation, error, share) in zip(layers, rows, strict=True):
        for color, kind in (("C0", "error"), ("C1", "feature")):
            prefix = f"{layer}/{kind}_correlation"
            band = [name for name in (f"{prefix}/min", f"{prefix}/max") if name in names]
            if len(band) == 2:
                low, high = ([line.get(name, float("nan")) for line in lines] for name in band)
                correlation.fill_between(_epochs(lines), low, high, color=color, alpha=0.2, linewidth=0)
            _curve(correlation, lines, f"{prefix}/mean", f"of {kind}s", color=color)
        correlation.set(ylabel=f"{layer}: correlation of pairs")
        branches = [name for name in names if name.startswith(f"{layer}/squared_error/")]
        for index, name in enumerate(branches):
            _curve(error, lines, name, name.rpartition("/")[2].replace("branch", "branch "), color=f"C{index % 10}")
        _curve(error, lines, f"{layer}/squared_error_of_mean", "their mean", color="black")
        error.set(ylabel="squared error", yscale=_scale(lines, [*branches, f"{layer}/squared_error_of_mean"]))
        shares = [name for name in names if name.startswith(f"{layer}/loss_share/")]
        for index, name in enumerate(shares):
            _curve(share, lines, name, "", lambda part: 100 * part, color=f"C{index % 10}")
        share.set(ylabel="share in the loss (%)")
        share.set_ylim(bottom=0)
    _finish(figure, path, [axes for row in rows for axes in row[:2]])


def _panels(
    lines: Sequence[Line], *, rows: int, columns: int, title: str
) -> tuple["Figure", list[tuple["Axes", "Axes", "Axes"]]]:
    if not lines:
        raise DataError(
            "There is no epoch to plot.", remedy="Pass the lines of a run with at least one finished epoch."
        )
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise BackendUnavailableError(
            "Plots need matplotlib, which is not installed.", remedy="Run pip install 'kdexport[plots]'."
        ) from None
    figure = Figure(figsize=(4.0 * columns, 3.0 * rows), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
    return figure, [tuple(row) for row in grid.tolist()]


def _curve(
    axes: "Axes",
    lines: Sequence[Line],
    name: str,
    label: str,
    scaled: Callable[[float], float] = float,
    color: str | None = None,
) -> None:
    values = [scaled(line.get(name, float("nan"))) for line in lines]
    # A line does not show a single epoch.
    axes.plot(_epochs(lines), values, color=color, label=label, marker="o" if len(lines) == 1 else None, linewidth=1.4)


def _scale(lines: Sequence[Line], names: Sequence[str]) -> str:
    """Logarithmic if all values are positive and span more than a factor of 10, otherwise linear."""
    values = [line[name] for line in lines for name in names if name in line]
    return "log" if values and min(values) > 0 and max(values) > 10 * min(values) else "linear"


def _epochs(lines: Sequence[Line]) -> list[float]:
    return [line.get("epoch", index + 1) for index, line in enumerate(lines)]


def _names(lines: Sequence[Line]) -> list[str]:
    """All names, in the order of their first occurrence."""
    return list(dict.fromkeys(name for line in lines for name in line))


def _finish(figure: "Figure", path: Path, legends: Sequence["Axes"]) -> None:
    for axes in legends:
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
    # Without the version of matplotlib, the bytes of the file depend only on its content.
    figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})
