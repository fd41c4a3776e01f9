"""KDiffusion (Yao et al., AAAI 2024): branches follow a diffusion reverse process to the teacher's feature."""

import torch
from torch import Tensor

from kdexport.students import Student
from training.diffusion import (
    SCHEDULES,
    MarginalOptions,
    Permutation,
    expected_loss_form,
    reverse_process_loss,
    step_weights_of,
)
from training.distillers import DISTILLERS
from training.distillers.branched import BranchedDistiller
from training.distillers.distiller import StepContext
from training.distillers.settings import KDiffusionSettings
from training.quadratic import Form, loss_form
from training.teachers import Teacher


@DISTILLERS.register("kdiffusion")
class KDiffusion(BranchedDistiller):
    """Each branch serves one step of the reverse process."""

    settings: KDiffusionSettings
    loss_name = "diffusion"

    def __init__(self, *, settings: KDiffusionSettings, student: Student, teacher: Teacher) -> None:
        super().__init__(settings=settings, student=student, teacher=teacher)
        steps = settings.num_branches - (settings.start == "own_branch")
        self._schedule = SCHEDULES[settings.schedule](steps)
        self._step_weights = step_weights_of(
            self._schedule, settings.step_weights, sigma=settings.sigma, limit=settings.kl_limit
        )
        self._marginal = MarginalOptions()
        if settings.trajectory == "marginal":
            self._marginal = MarginalOptions(
                start=settings.start, noise=settings.noise, target=settings.target, sigma=settings.sigma
            )

    def order(self, step: StepContext, layer: int) -> Tensor | None:
        if self.settings.permutation != "shuffle":
            return None
        if self.settings.shuffle_per == "sample":
            # Drawn here, because a step has no order for each sample; a resumed run draws the same orders.
            drawn = torch.rand(len(step.labels), self.settings.num_branches, device=step.labels.device)
            return drawn.argsort(1)
        return step.orders[layer if self.settings.shuffle_per == "layer" else 0]

    def distance(self, branches: Tensor, target: Tensor, order: Tensor | None) -> Tensor:
        return reverse_process_loss(
            branches,
            target,
            self._schedule,
            self._permutation(order),
            self.settings.trajectory,
            step_weights=self._step_weights,
            backpropagation=self.settings.backpropagation,
            marginal=self._marginal,
        )

    def guided(self, branches: Tensor, order: Tensor | None) -> Tensor:
        if self.settings.guide_feature == "mean":
            return super().guided(branches, order)
        if self.settings.guide_feature == "all":
            return branches
        # The process ends at the prediction of the branch of step k = 1.
        if order is None:
            return branches[:1]
        if order.ndim == 1:
            return branches.index_select(0, order[:1])
        return branches[order[:, 0], torch.arange(len(order), device=order.device)].unsqueeze(0)

    def loss_form(self) -> Form | None:
        """None for the marginal trajectory, whose loss is not zero if all errors are zero."""
        if self.settings.trajectory == "marginal":
            return None
        if self.settings.permutation == "fixed":
            return loss_form(self._schedule.steps, self._step_weights)
        return expected_loss_form(self._schedule, self._step_weights)

    def _permutation(self, order: Tensor | None) -> Permutation:
        if order is not None:
            return order
        return "expected" if self.settings.permutation == "expected" else tuple(range(self.settings.num_branches))
