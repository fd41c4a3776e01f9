"""Plots of a run, drawn from the lines that the run wrote."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdexport.errors import BackendUnavailableError, DataError
from tests.training.distillers.random_branches import drawn
from training.distillers.diversity import as_floats, branch_diversity
from training.runs.plots import plot_diversity, plot_learning_curves


def run_lines(epochs: int) -> list[dict[str, float]]:
    return [
        {
            "epoch": epoch,
            "loss/cross_entropy": 4.0 / epoch,
            "loss/diffusion": 2.0 / epoch**2,
            "top1": 0.7 - 0.5 / epoch,
            "lr": 0.1 * 0.1 ** (epoch // 4),
        }
        for epoch in range(1, epochs + 1)
    ]


def diversity_lines(epochs: int, layers: tuple[str, ...] = ("stage3", "last")) -> list[dict[str, float]]:
    lines = []
    for epoch in range(1, epochs + 1):
        line: dict[str, float] = {"epoch": epoch}
        for number, layer in enumerate(layers):
            branches, target = drawn(4, seed=10 * epoch + number)
            measured = branch_diversity(branches, target, torch.eye(4))
            line.update({f"{layer}/{name}": value for name, value in as_floats(measured.scalars()).items()})
        lines.append(line)
    return lines


def inked(path: Path) -> tuple[tuple[int, int], int]:
    """(width, height), and how many pixels are coloured."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
        return image.size, int((np.ptp(pixels, axis=2) > 40).sum())


@pytest.mark.parametrize("epochs", [1, 7])
def test_plots_are_drawn_and_the_same_lines_give_the_same_file(tmp_path: Path, epochs: int) -> None:
    curves, again, diversity = (tmp_path / f"{name}.png" for name in ("curves", "again", "diversity"))
    plot_learning_curves(run_lines(epochs), curves, title="resnet8 -> mobilenetv2")
    plot_learning_curves(run_lines(epochs), again, title="resnet8 -> mobilenetv2")
    assert curves.read_bytes() == again.read_bytes()
    plot_diversity(diversity_lines(epochs), diversity)
    assert inked(curves)[1] > 100
    assert inked(diversity)[1] > 200
    # A row for each of two layers.
    assert inked(diversity)[0] == (inked(curves)[0][0], 2 * inked(curves)[0][1])
    # No figure is left behind in a global registry, and none was made there.
    assert "matplotlib.pyplot" not in sys.modules


def test_the_teachers_top1_is_a_line_of_its_own(tmp_path: Path) -> None:
    plot_learning_curves(run_lines(5), tmp_path / "without.png")
    plot_learning_curves(run_lines(5), tmp_path / "with.png", teacher_top1=0.65)
    assert (tmp_path / "without.png").read_bytes() != (tmp_path / "with.png").read_bytes()


def test_lines_may_lack_what_other_lines_have(tmp_path: Path) -> None:
    lines = [{"epoch": 1, "lr": 0.1, "top1": 0.2}, *run_lines(3)[1:]]
    plot_learning_curves(lines, tmp_path / "curves.png")
    assert inked(tmp_path / "curves.png")[1] > 100
    one_branch = [{"epoch": 1, **{f"last/{k}": v for k, v in as_floats(branch_diversity(*drawn(1)).scalars()).items()}}]
    plot_diversity(one_branch, tmp_path / "diversity.png")


def test_lines_that_cannot_be_plotted_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="There is no epoch to plot"):
        plot_learning_curves([], tmp_path / "x.png")
    with pytest.raises(DataError, match="None of the 2 lines has the diversity of a layer"):
        plot_diversity(run_lines(2), tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match=r"Plots need matplotlib(?s:.)*kdexport\[plots\]"):
        plot_learning_curves(run_lines(2), tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
