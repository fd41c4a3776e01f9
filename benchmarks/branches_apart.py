"""What keeps parallel branches different, and does it help? Trains each arm with each seed and writes the page.

python benchmarks/subset.py data/cifar100 data/tiny --train 125 --test 100 --classes 20
python benchmarks/branches_apart.py --data data/tiny --teacher-checkpoint cifar100_resnet56-f2eff4c8.pt \
    --runs runs/apart --out docs/results/branches-apart.md

A run that was stopped is continued by the same command; seeds are the outer loop. ``--report`` only writes the page.
Every arm but ``plain`` has branches on several layers, the guide, and as its loss on each layer, with the errors e_j of
the m branches and their mean e,

    (m alpha + m^2 beta) |e|^2 + pull alpha sum_j |e_j - e|^2,

where alpha and beta are those of the expected loss of KDiffusion (docs/method.md); ``pull`` = 1 is KDiffusion itself.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdexport.reparam.branches import ParallelBranches
from kdexport.students import Student
from training.diffusion import SCHEDULES, expected_loss_coefficients
from training.distillers import DISTILLERS
from training.distillers.branched import BranchedDistiller
from training.distillers.settings import BranchedSettings, NonNegative, method_settings
from training.quadratic import Form, symmetric_form
from training.recipe import Recipe, load_recipe
from training.study.table import interval, spread
from training.teachers import Teacher
from training.train import distil

ARMS: dict[str, dict[str, Any]] = {
    "plain": {"name": "plain"},
    "KDiffusion": {"name": "kdiffusion", "permutation": "expected"},
    "pull 0.1": {"name": "apart", "pull": 0.1},
    "average (pull 0)": {"name": "apart", "pull": 0.0},
    "average, decorrelated": {"name": "apart", "pull": 0.0, "decorrelation": 1.0},
    "dropout of inputs": {"name": "apart", "input_dropout": 0.25},
    "parts of the inputs": {"name": "apart", "input_part": 0.5},
    "orthogonal start": {"name": "apart", "orthogonal": True},
}
_BASE = "KDiffusion"


@method_settings
class ApartSettings(BranchedSettings):
    """KDiffusion's expected loss with means that could keep the branches different."""

    name: Literal["apart"] = "apart"
    #: Factor of the term that makes the branches equal.
    pull: NonNegative = 1.0
    #: Weight of the mean squared correlation between the features of two branches.
    decorrelation: NonNegative = 0.0
    #: Probability that a channel of a branch's input is zero in a step; each branch draws its own.
    input_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    #: The part of the input channels that a branch reads, always the same ones; the fold stays exact.
    input_part: Annotated[float, Field(gt=0, le=1)] = 1.0
    #: Whether the kernels of a layer's branches start as rows of one orthogonal matrix.
    orthogonal: bool = False


@DISTILLERS.register("apart")
class Apart(BranchedDistiller):
    """KDiffusion's expected loss with a factor on what makes branches equal, and other inputs or starts for each."""

    settings: ApartSettings
    loss_name = "diffusion"

    def __init__(self, *, settings: ApartSettings, student: Student, teacher: Teacher) -> None:
        super().__init__(settings=settings, student=student, teacher=teacher)
        # A list, so that the student does not become a part of this module.
        self._student = [student]
        alpha, beta = expected_loss_coefficients(SCHEDULES["cosine"](settings.num_branches))
        self._mean, self._spread = alpha + settings.num_branches * beta, settings.pull * alpha

    def calibrate(self, teacher_taps: Any) -> None:
        super().calibrate(teacher_taps)
        generator = torch.Generator().manual_seed(0)
        for part in self._student[0].modules():
            if isinstance(part, ParallelBranches):
                change_branches(part, self.settings, generator)

    def distance(self, branches: Tensor, target: Tensor, order: Tensor | None) -> Tensor:  # noqa: ARG002
        mean = branches.mean(0)
        count = len(branches)
        # alpha sum |e_j|^2 + beta |sum e_j|^2, split into the mean and the differences from it.
        loss = self._mean * count * (mean - target).square().mean()
        loss = loss + self._spread * count * (branches - mean).square().mean()
        if self.settings.decorrelation > 0:
            loss = loss + self.settings.decorrelation * squared_correlation(branches)
        return loss

    def loss_form(self) -> Form:
        count = self.settings.num_branches
        return symmetric_form(self._spread, (self._mean - self._spread) / count, count)


def squared_correlation(branches: Tensor) -> Tensor:
    """The mean over pairs of the squared correlation of m features (m,N,C,h,w), without the means of channels."""
    centred = (branches - branches.mean((1, 3, 4), keepdim=True)).flatten(1)
    unit = nn.functional.normalize(centred, dim=1)
    squared = (unit @ unit.T).square()
    count = len(branches)
    return (squared.sum() - squared.diagonal().sum()) / (count * (count - 1))


def change_branches(layer: ParallelBranches, settings: ApartSettings, generator: torch.Generator) -> None:
    """Give each branch of ``layer`` a start or an input of its own, in place."""
    first = [branch[0] for branch in layer.branches if isinstance(branch, nn.Sequential)]
    convolutions = [conv for conv in first if isinstance(conv, nn.Conv2d)]
    if settings.orthogonal:
        rows = sum(conv.weight.shape[0] for conv in convolutions)
        joint = torch.empty(rows, convolutions[0].weight[0].numel())
        nn.init.orthogonal_(joint, generator=generator)
        scale = convolutions[0].weight.std() / joint.std()
        start = 0
        for conv in convolutions:
            stop = start + conv.weight.shape[0]
            conv.weight.data.copy_((joint[start:stop] * scale).reshape(conv.weight.shape))
            start = stop
    for conv in convolutions:
        if settings.input_part < 1:
            read = torch.rand(conv.in_channels, generator=generator).argsort() < round(
                settings.input_part * conv.in_channels
            )
            conv.register_forward_pre_hook(_masked(read.float().reshape(1, -1, 1, 1)))
        if settings.input_dropout > 0:
            conv.register_forward_pre_hook(_dropped(settings.input_dropout))


def _masked(mask: Tensor) -> Any:
    return lambda _module, inputs: (inputs[0] * mask,)


def _dropped(probability: float) -> Any:
    def drop(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (nn.functional.dropout2d(inputs[0], probability, training=module.training),)

    return drop


def recipe_of(arm: str, seed: int, data: str, teacher: str, epochs: int) -> Recipe:
    """The recipe of one run: the schedule of the small study."""
    branched = {} if arm == "plain" else {"layers": "multi", "target_guide": 1.0, "ramp_epochs": epochs / 10}
    changes = {
        "data": {"name": f"folder:{data}", "root": data},
        "teacher": {"checkpoint": teacher},
        "distiller": {**ARMS[arm], **branched},
        "train": {
            "epochs": epochs, "seed": seed, "learning_rate": 0.04, "schedule": "cosine", "nesterov": True,
            "warmup_epochs": epochs / 20, "teacher_precision": "no",
        },
    }  # fmt: skip
    return load_recipe("cifar100", changes)


def read_run(folder: Path, epochs: int) -> tuple[float, dict[str, float]] | None:
    """Top-1 in percent of the last epoch, and how the branches differed then; None if the run is not finished."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if len(lines) < epochs:
        return None
    path = folder / "diversity.jsonl"
    last = json.loads(path.read_text().splitlines()[-1]) if path.is_file() else {}
    return 100 * lines[-1]["top1"], last


def page(results: dict[str, dict[int, tuple[float, dict[str, float]]]], about: str) -> str:
    """The page of ``results`` by arm and seed."""
    seeds = sorted({seed for runs in results.values() for seed in runs})
    lines = [
        f"| arm | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | against plain | against KDiffusion |",
        f"|---|{'---|' * (len(seeds) + 3)}",
    ]
    for arm, runs in results.items():
        cells = [f"{runs[seed][0]:.2f}" if seed in runs else "" for seed in seeds]
        lines.append(
            f"| {arm} | {' | '.join(cells)} | {spread([value for value, _ in runs.values()])} | "
            f"{_against(results, arm, 'plain')} | {_against(results, arm, _BASE)} |"
        )
    last = ["| arm | layer | features | errors | ambiguity |", "|---|---|---|---|---|"]
    for arm, runs in results.items():
        layers = sorted({key.split("/")[0] for _, measured in runs.values() for key in measured if "/" in key})
        for layer in layers[:1] + layers[-1:]:
            cells = [
                _range([measured[f"{layer}/{name}"] for _, measured in runs.values()])
                for name in ("feature_correlation/mean", "error_correlation/mean", "ambiguity")
            ]
            last.append(f"| {arm} | {layer} | {' | '.join(cells)} |")
    return about + "\n".join(["", *lines, "", "## Do the branches differ?", "", *last, ""])


def _against(results: dict[str, dict[int, tuple[float, dict[str, float]]]], arm: str, other: str) -> str:
    both = sorted(results[arm].keys() & results.get(other, {}).keys())
    if arm == other or len(both) < 2:
        return ""
    return interval([results[arm][seed][0] - results[other][seed][0] for seed in both])


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def main() -> int:
    """Train what is missing; write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher-checkpoint", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--report", action="store_true", help="write the page from the finished runs; train nothing")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    results: dict[str, dict[int, tuple[float, dict[str, float]]]] = {arm: {} for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            folder = arguments.runs / arm.replace(" ", "-").replace(",", "") / str(seed)
            if not arguments.report:
                distil(recipe_of(arm, seed, arguments.data, arguments.teacher_checkpoint, arguments.epochs), folder)
            finished = read_run(folder, arguments.epochs) if (folder / "metrics.jsonl").is_file() else None
            if finished is not None:
                results[arm][seed] = finished
    about = f"{platform.processor() or platform.machine()}, torch {torch.__version__}\n"
    arguments.out.write_text(page(results, about), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
