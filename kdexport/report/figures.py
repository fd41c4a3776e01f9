"""Plots as inline SVG. Their colours are variables of the page, so that one plot is right on light, dark and paper.

matplotlib draws; each function takes numbers and names and returns one ``<svg>``. The same input gives the same bytes.
Names are shown as they are, never as mathematics, and cut to a length that fits.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import cycle
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from kdexport.stats.proportions import Estimate
from kdexport.stats.scores import CalibrationBin, ClassScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

#: (when, lowest, median, highest) of a measurement; times as text that sorts, latencies in ms.
TimedPoint = tuple[str, float, float, float]

#: Stand-ins that matplotlib draws with, each replaced by the variable of the page: ``var(--ink)``.
INK, MUTED, GRID = "#100001", "#100002", "#100003"
FIRST, SECOND, BAD, PAPER = "#100004", "#100005", "#100006", "#100007"
_VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", FIRST: "first", SECOND: "second", BAD: "bad", PAPER: "paper",
}  # fmt: skip
#: Of cells of the confusion matrix; their opacity is the share of images.
_CELL = (0.13, 0.43, 0.75)

#: Inches; a plot is about as wide as the screen of a phone, where the text of a wider one would be too small.
_WIDTH = 4.2
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.5, "axes.titlesize": 9.5, "figure.dpi": 72.0,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "axes.titlecolor": INK, "text.color": INK, "xtick.color": MUTED,
    "ytick.color": MUTED, "xtick.labelcolor": MUTED, "ytick.labelcolor": INK, "grid.color": GRID, "axes.facecolor":
    "none", "figure.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False, "legend.fontsize": 8.5,
    "legend.labelcolor": INK, "axes.axisbelow": True, "lines.color": INK, "patch.edgecolor": GRID,
}  # fmt: skip
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_NAMED_CELLS = 16
_LONGEST_NAME = 22


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetPoint:
    """A row of the plot of targets; a number that is not known is not drawn."""

    name: str
    megabytes: float | None
    latency_ms: float | None
    top1: Estimate | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedKind:
    """``count`` blocks of one kind: ``before`` are their parallel paths, each a chain of layers."""

    count: int
    before: tuple[tuple[str, ...], ...]
    after: str


def _figure(name: str) -> Callable[[Callable[Concatenate["Figure", P], None]], Callable[P, str]]:
    """A function that draws on a figure as one that returns its SVG; ``name`` makes its ids differ from other plots."""

    def decorate(draw: Callable[Concatenate["Figure", P], None]) -> Callable[P, str]:
        @wraps(draw)
        def drawn(*arguments: P.args, **named: P.kwargs) -> str:
            import matplotlib as mpl
            from matplotlib.figure import Figure

            written = io.StringIO()
            with mpl.rc_context(), warnings.catch_warnings():
                # A user's own style would give other bytes; a glyph that the measuring font lacks is in the browser's.
                mpl.rcdefaults()
                mpl.rcParams.update(_STYLE)
                mpl.rcParams["svg.hashsalt"] = name
                warnings.simplefilter("ignore")
                figure = Figure(layout="constrained")
                draw(figure, *arguments, **named)
                figure.savefig(written, format="svg", metadata={"Date": None})
            return _inline(written.getvalue(), name)

        return drawn

    return decorate


def _inline(source: str, name: str) -> str:
    """The ``<svg>`` of a file for the body of a page: variables for colours, and ids of its own."""
    root = ElementTree.fromstring(source)  # noqa: S314, matplotlib wrote it
    used = set(re.findall(r"#([\w-]+)", " ".join(_references(root))))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{_SVG}}}metadata":
                parent.remove(child)
    for element in root.iter():
        # HTML knows these elements without their namespace.
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        element.attrib = {
            key.removeprefix(f"{{{_LINK}}}"): _attribute(key, value, name)
            for key, value in element.attrib.items()
            if key != "id" or value in used
        }
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    # The text alternative is on the element around it.
    root.set("aria-hidden", "true")
    root.set("focusable", "false")
    return re.sub(r"\n\s*", "\n", ElementTree.tostring(root, encoding="unicode"))


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href") and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = value.replace("url(#", f"url(#{name}-")
    return _coloured(value) if key == "style" else value


def _references(root: ElementTree.Element) -> list[str]:
    return [
        value for element in root.iter() for key, value in element.attrib.items()
        if key.endswith("href") or value.startswith("url(") or "url(#" in value
    ]  # fmt: skip


def _coloured(style: str) -> str:
    for stand_in, variable in _VARIABLES.items():
        style = style.replace(stand_in, f"var(--{variable})")
    return style


def label(text: str, longest: int = _LONGEST_NAME) -> str:
    """``text`` as one line of printable characters, cut to ``longest``."""
    shown = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return shown if len(shown) <= longest else f"{shown[: longest - 3]}..."


@_figure("targets")
def target_panels(figure: "Figure", rows: Sequence[TargetPoint], teacher: float | None) -> None:
    """Size, latency and top-1 with its interval of each target, a panel each; ``teacher`` is its top-1."""
    count = len(rows)
    figure.set_size_inches(_WIDTH, 3 * (0.62 + 0.24 * count))
    size, latency, accuracy = figure.subplots(3, 1)
    names, places = [label(row.name) for row in rows], np.arange(count)
    for axes, title, values, form in (
        (size, "Size, MB", [row.megabytes for row in rows], "{:.2f}"),
        (latency, "Latency, ms", [row.latency_ms for row in rows], "{:.3f}"),
    ):
        shown = [value or 0.0 for value in values]
        axes.barh(places, shown, height=0.6, color=FIRST, linewidth=0)
        right = max([*shown, 1e-9])
        for place, value in enumerate(values):
            text = "not measured" if value is None else form.format(value)
            axes.text((value or 0.0) + 0.02 * right, place, text, va="center", color=MUTED, fontsize=8.5)
        axes.set_xlim(0, 1.3 * right)
        _rows(axes, names, title)
    known = [(place, row.top1) for place, row in enumerate(rows) if row.top1 is not None]
    for place, top1 in known:
        accuracy.plot([100 * top1.low, 100 * top1.high], [place, place], color=FIRST, lw=1.5, solid_capstyle="butt")
        accuracy.plot(100 * top1.value, place, "o", color=FIRST, ms=6)
    if teacher is not None:
        accuracy.axvline(100 * teacher, color=SECOND, lw=1.4, ls="--")
    accuracy.set_ylim(-0.6, count - 0.4)
    _rows(accuracy, names, "Top-1, %" + ("" if teacher is None else "; dashed: teacher"))


def _rows(axes: "Axes", names: Sequence[str], title: str) -> None:
    """Rows from the top down, named at the left."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", lw=0.6)
    axes.spines["left"].set_visible(False)


@_figure("classes")
def class_dots(figure: "Figure", scores: Sequence[ClassScore]) -> None:
    """The share of each class that is recognised, with its interval; one row each."""
    figure.set_size_inches(_WIDTH, 0.75 + 0.22 * len(scores))
    axes = figure.add_subplot()
    for place, score in enumerate(scores):
        if score.recall is not None:
            ends = [100 * score.recall.low, 100 * score.recall.high]
            axes.plot(ends, [place, place], color=FIRST, lw=1.5, solid_capstyle="butt")
            axes.plot(100 * score.recall.value, place, "o", color=FIRST, ms=5)
    axes.set_xlim(-2, 102)
    axes.set_ylim(-0.6, max(len(scores), 1) - 0.4)
    _rows(axes, [label(score.name) for score in scores], "Recognised, %")


@_figure("confusion")
def confusion_map(figure: "Figure", confusion: NDArray[np.int64], names: Sequence[str]) -> None:
    """Shares of the images of each true class (row) by predicted class (column); counts where they fit."""
    count = len(names)
    named = count <= _NAMED_CELLS
    figure.set_size_inches(_WIDTH, _WIDTH)
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    cells = np.empty((count, count, 4))
    cells[..., :3], cells[..., 3] = _CELL, 0.75 * shares
    axes.imshow(cells, interpolation="none", aspect="equal")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    for spine in axes.spines.values():
        spine.set_visible(True)
    if not named:
        return
    shown = [label(name, 10) for name in names]
    axes.set_xticks(range(count), shown, rotation=90)
    axes.set_yticks(range(count), shown)
    axes.tick_params(length=0, labelcolor=INK)
    for row in range(count):
        for column in range(count):
            if confusion[row, column]:
                axes.text(column, row, f"{confusion[row, column]:,}", ha="center", va="center", color=INK, fontsize=7.5)


@_figure("calibration")
def reliability(figure: "Figure", bins: Sequence[CalibrationBin]) -> None:
    """The share of right answers against the probability that was given, and how many images are in each bin."""
    figure.set_size_inches(_WIDTH, 3.9)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 100], [0, 100], color=MUTED, lw=1, ls="--")
    axes.annotate("calibrated", (22, 24), color=MUTED, rotation=0, fontsize=8.5, ha="right")
    for each in bins:
        axes.plot([100 * each.confidence] * 2, [100 * each.confidence, 100 * each.accuracy], color=BAD, lw=1.4)
    axes.plot([100 * each.confidence for each in bins], [100 * each.accuracy for each in bins], "o", color=FIRST, ms=6)
    axes.set(xlim=(0, 101), ylim=(-3, 104))
    axes.set_ylabel("right, %")
    axes.grid(lw=0.6)
    widths = [100 * (each.high - each.low) - 0.6 for each in bins]
    middles = [50 * (each.low + each.high) for each in bins]
    below.bar(middles, [each.images for each in bins], width=widths, color=FIRST, linewidth=0)
    below.set_yscale("log")
    below.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    below.yaxis.set_minor_formatter(lambda _value, _: "")
    below.set_ylim(0.7, 3 * max([each.images for each in bins], default=1))
    below.set_ylabel("images")
    below.set_xlabel("probability of the answer, %")


@_figure("margins")
def margin_histogram(
    figure: "Figure",
    margins: NDArray[np.float64],
    flips: Mapping[str, NDArray[np.float64]],
    limits: Mapping[str, float],
) -> None:
    """How sure the unfused student is of each image, and where the flips of each file are.

    ``limits`` is the margin up to which the error that the rungs allow can flip an answer of the file.
    """
    figure.set_size_inches(_WIDTH, 2.5 + 0.28 * len(limits))
    axes, rows = figure.subplots(2, 1, sharex=True, height_ratios=(2, max(0.28 * len(limits), 0.3)))
    ends = [value for value in (*margins, *limits.values()) if np.isfinite(value) and value > 0]
    low, high = min(ends, default=1e-3) / 1.5, max(ends, default=1.0) * 1.5
    axes.hist(np.clip(margins, low, high), bins=list(np.geomspace(low, high, 41)), color=FIRST, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylabel("images")
    axes.grid(axis="y", lw=0.6)
    for place, (name, limit) in enumerate(limits.items()):
        found = np.clip(flips.get(name, np.empty(0)), low, high)
        if limit > low:
            rows.plot([low, min(limit, high)], [place, place], color=GRID, lw=7, solid_capstyle="butt")
        rows.plot(found, np.full(len(found), place), "|", color=BAD, ms=11, mew=1.3)
    rows.set_ylim(-0.6, max(len(limits), 1) - 0.4)
    rows.set_yticks(range(len(limits)), [label(name) for name in limits])
    rows.invert_yaxis()
    rows.tick_params(axis="y", length=0)
    rows.spines["left"].set_visible(False)
    # The default writes powers of ten as mathematics, which is off for the names of users.
    rows.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    rows.xaxis.set_minor_formatter(lambda _value, _: "")
    rows.set_xlabel("margin (log scale)")


def history_lines(number: int, arms: Mapping[str, Sequence[TimedPoint]]) -> str:
    """The latency of each arm over its measurements, which are evenly spaced; plot ``number`` of its page."""
    return _figure(f"history{number}")(_draw_history)(arms)


def _draw_history(figure: "Figure", arms: Mapping[str, Sequence[TimedPoint]]) -> None:
    figure.set_size_inches(_WIDTH, 3.4)
    axes = figure.add_subplot()
    times = sorted({point[0] for points in arms.values() for point in points})
    places = {time: place for place, time in enumerate(times)}
    for (name, points), colour, mark in zip(arms.items(), cycle((FIRST, SECOND, INK, BAD)), cycle("osD^v")):
        across = [places[point[0]] for point in points]
        axes.vlines(across, [point[1] for point in points], [point[3] for point in points], color=colour, lw=1.2)
        axes.plot(across, [point[2] for point in points], f"-{mark}", color=colour, ms=5, lw=1.4, label=label(name, 28))
    step = -(-len(times) // 6) or 1
    axes.set_xticks(range(0, len(times), step), [time[:10] for time in times[::step]], rotation=30, ha="right")
    axes.set_ylabel("latency, ms")
    axes.grid(axis="y", lw=0.6)
    if arms:
        figure.legend(loc="outside upper left")


@_figure("merge")
def merge_picture(figure: "Figure", kinds: Sequence[MergedKind]) -> None:
    """The layers of each kind of block before the merge, and the one layer after it."""
    heights = [max(len(kind.before), 1) * 0.34 + 0.34 for kind in kinds]
    figure.set_size_inches(_WIDTH, 0.3 + sum(heights))
    axes = figure.add_subplot()
    axes.set(xlim=(0, 10), ylim=(-sum(heights), 0.3))
    axes.axis("off")
    axes.text(2.7, 0.1, "trained", ha="center", color=MUTED)
    axes.text(8.1, 0.1, "exported", ha="center", color=MUTED)
    top = 0.0
    for kind, height in zip(kinds, heights, strict=True):
        middle = top - height / 2
        for place, chain in enumerate(kind.before):
            y = middle + 0.34 * ((len(kind.before) - 1) / 2 - place)
            width = 5.0 / len(chain)
            for index, layer in enumerate(chain):
                _box(axes, 0.2 + index * width, y, width - 0.15, layer, SECOND)
        axes.annotate("", (6.4, middle), (5.4, middle), arrowprops={"arrowstyle": "->", "color": MUTED, "lw": 1.2})
        _box(axes, 6.6, middle, 2.2, kind.after, FIRST)
        axes.text(9.0, middle, f"x {kind.count}", va="center", color=INK)
        top -= height


def _box(axes: "Axes", left: float, middle: float, width: float, text: str, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, middle - 0.13), width, 0.26, facecolor="none", edgecolor=colour, lw=1.3))
    axes.text(left + width / 2, middle, label(text, 18), ha="center", va="center", fontsize=7.5)
