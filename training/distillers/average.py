"""The mean of parallel branches against the teacher's feature: what KDiffusion is without its diffusion process."""

import torch
from torch import Tensor

from training.distillers import DISTILLERS
from training.distillers.branched import BranchedDistiller
from training.distillers.distiller import StepContext
from training.methods import AverageSettings


@DISTILLERS.register("average")
class Average(BranchedDistiller):
    """Squared distance of the branches' mean from the teacher, mean over all elements."""

    settings: AverageSettings
    loss_name = "average"

    def distance(
        self,
        branches: list[Tensor],
        target: Tensor,
        step: StepContext,  # noqa: ARG002
        layer: int,  # noqa: ARG002
    ) -> Tensor:
        return (torch.stack(branches).mean(0) - target).square().mean()
