import math
import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest

from kdexport.report import figures
from kdexport.report.figures import MergedKind, TargetPoint, label
from kdexport.stats.proportions import Estimate
from kdexport.stats.scores import Scores, score
from tests.kdexport.report.manifests import HOSTILE

NAMES = ("$\\frac{1}{0}$", "$x", HOSTILE, 'id="a" url(#b) #100001', "\x00\ufffe", "\u4e2d\u6587", "")
SOME = Estimate(value=0.5, low=0.25, high=0.75)
POINTS = [
    TargetPoint(name=name, megabytes=size, latency_ms=time, top1=top1)
    for name, size, time, top1 in zip(
        NAMES, (1.5, None, 0.0, 1e9, 1e-9, 3, 4), (None, 1.0, 1e-6, 2, 1e7, 0.0, 3), (SOME, None, *[SOME] * 5),
        strict=True,
    )
]  # fmt: skip


def scores(count: int = 7) -> Scores:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, count, 150)
    return score(rng.normal(0, 2, (150, count)), labels, tuple(NAMES[index % 7] for index in range(count)))


FOUND = scores()
DRAWN: dict[str, Callable[[], str]] = {
    "targets": lambda: figures.target_panels(POINTS, 0.9),
    "no target": lambda: figures.target_panels([], None),
    "classes": lambda: figures.class_dots(FOUND.classes),
    "no class": lambda: figures.class_dots([]),
    "confusion": lambda: figures.confusion_map(FOUND.confusion, NAMES),
    "confusion of one": lambda: figures.confusion_map(np.zeros((1, 1), np.int64), ["a"]),
    "confusion of 1,000": lambda: figures.confusion_map(np.eye(1000, dtype=np.int64), ["a"] * 1000),
    "reliability": lambda: figures.reliability(FOUND.bins),
    "margins": lambda: figures.margin_histogram(
        np.array([0.0, 1e-30, 3.0, 1e30]), {NAMES[0]: np.array([0.0, 5.0])}, {NAMES[0]: 1e-5, NAMES[2]: 0.0}
    ),
    "no margins": lambda: figures.margin_histogram(np.zeros(3), {}, {}),
    "merge": lambda: figures.merge_picture(
        [MergedKind(count=3, before=(NAMES[:4], NAMES[4:]), after=NAMES[2]), MergedKind(count=1, before=(), after="")]
    ),
    "no merge": lambda: figures.merge_picture([]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_plot_of_hostile_names_and_numbers_is_sound_and_uses_the_colours_of_the_page(name: str) -> None:
    source = DRAWN[name]()
    root = ElementTree.fromstring(source)
    assert root.tag == "svg"
    assert len(source) < 120_000
    assert not re.search("nan|inf\\b", re.sub("<text.*?</text>", "", source))
    styles = [element.get("style", "") for element in root.iter()]
    assert not [style for style in styles if "#10000" in style]
    assert not [element.tag for element in root.iter() if element.tag in ("script", "foreignObject", "b", "metadata")]
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert DRAWN[name]() == source


def test_a_name_is_text_and_neither_mathematics_nor_markup() -> None:
    texts = [element.text for element in ElementTree.fromstring(DRAWN["targets"]()).iter("text")]
    assert label(NAMES[0]) in texts
    assert "$x" in texts
    assert label(HOSTILE) in texts
    assert label(NAMES[3]) in texts


def test_a_label_is_one_line_of_letters_that_fit() -> None:
    assert label("a\nb\x1b[31m\u202e c") == "a b [31m c"
    assert label("x" * 50, 10) == "xxxxxxx..."
    assert len(label("y" * 22)) == 22


def test_bars_are_as_long_as_their_numbers() -> None:
    rows = [
        TargetPoint(name=name, megabytes=size, latency_ms=None, top1=None)
        for name, size in zip("ab", (1.0, 3.0), strict=True)
    ]
    root = ElementTree.fromstring(figures.target_panels(rows, None))
    widths = []
    for path in root.iter("path"):
        if "var(--first)" in path.get("style", "") and path.get("d", "").count("L") == 3:
            across = [float(pair.split()[0]) for pair in re.findall(r"[ML] ([-\d.]+ [-\d.]+)", path.get("d", ""))]
            widths.append(max(across) - min(across))
    assert widths[1] / widths[0] == pytest.approx(3, rel=1e-3)
    assert not any(map(math.isnan, widths))
