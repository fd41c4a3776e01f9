"""The mean of parallel branches against the teacher's feature: what KDiffusion is without its diffusion process."""

from torch import Tensor

from training.distillers import DISTILLERS
from training.distillers.branched import BranchedDistiller
from training.distillers.settings import AverageSettings
from training.quadratic import Form, symmetric_form


@DISTILLERS.register("average")
class Average(BranchedDistiller):
    """Squared distance of the branches' mean from the teacher, mean over all elements."""

    settings: AverageSettings
    loss_name = "average"

    def distance(self, branches: Tensor, target: Tensor, order: Tensor | None) -> Tensor:  # noqa: ARG002
        return (branches.mean(0) - target).square().mean()

    def loss_form(self) -> Form:
        count = self.settings.num_branches
        return symmetric_form(0.0, 1 / count**2, count)
