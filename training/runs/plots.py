"""Plots of a run as PNG files: what its losses did, and whether its branches differ; with matplotlib (extra ``plots``).

Figures are drawn by objects of their own, without pyplot's global state, and the same lines give the same bytes.
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
    """Losses, top-1 (a share; the teacher's as a dashed line) and learning rate over epochs, from metrics.jsonl lines.

    Raises ``DataError`` without any epoch, ``BackendUnavailableError`` without matplotlib.
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
    """How the branches of each layer differ over epochs, from lines of ``BranchedDistiller.diversity``; a row a layer.

    Correlations as the mean over pairs in the band of all of them; squared errors of the branches and of their mean;
    each branch's share in the loss. Raises ``DataError`` without any layer, ``BackendUnavailableError`` without
    matplotlib.
    """
    names = _names(lines)
    layers = [name.removesuffix("/ambiguity") for name in names if name.endswith("/ambiguity")]
    if not layers:
        raise DataError("No line has the diversity of a layer.", remedy="Pass the diversity.jsonl of a branched run.")
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
        raise DataError("There is no epoch to plot.", remedy="Pass the lines of a run that has ended an epoch.")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise BackendUnavailableError(
            "Plots need matplotlib, which is not installed.", remedy="pip install 'kdexport[plots]'"
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
    # One epoch is a point, which a line does not show.
    axes.plot(_epochs(lines), values, color=color, label=label, marker="o" if len(lines) == 1 else None, linewidth=1.4)


def _scale(lines: Sequence[Line], names: Sequence[str]) -> str:
    """Logarithmic where all that is drawn is positive and spans more than a decade."""
    values = [line[name] for line in lines for name in names if name in line]
    return "log" if values and min(values) > 0 and max(values) > 10 * min(values) else "linear"


def _epochs(lines: Sequence[Line]) -> list[float]:
    return [line.get("epoch", index + 1) for index, line in enumerate(lines)]


def _names(lines: Sequence[Line]) -> list[str]:
    """Every name in the order of its first line."""
    return list(dict.fromkeys(name for line in lines for name in line))


def _finish(figure: "Figure", path: Path, legends: Sequence["Axes"]) -> None:
    for axes in legends:
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
    # Without the version of matplotlib in it, the file depends on what is drawn alone.
    figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})
