"""Distance of the mean of parallel branches from the teacher's feature: KDiffusion without the diffusion process."""

from torch import Tensor

from training.distillers import DISTILLERS
from training.distillers.branched import BranchedDistiller
from training.distillers.settings import AverageSettings
from training.quadratic import Form, symmetric_form


@DISTILLERS.register("average")
class Average(BranchedDistiller):
    """Squared distance between the mean of the branches and the teacher's feature, mean over all elements."""

    settings: AverageSettings
    loss_name = "average"

    def distance(self, branches: Tensor, target: Tensor, order: Tensor | None) -> Tensor:  # noqa: ARG002
        return (branches.mean(0) - target).square().mean()

    def loss_form(self) -> Form:
        count = self.settings.num_branches
        return symmetric_form(0.0, 1 / count**2, count)
