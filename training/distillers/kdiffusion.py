"""KDiffusion (Yao et al., AAAI 2024): branches walk a diffusion reverse process towards the teacher's feature."""

from torch import Tensor

from kdexport.students import Student
from training.diffusion import SCHEDULES, Permutation, reverse_process_loss
from training.distillers import DISTILLERS
from training.distillers.branched import BranchedDistiller
from training.distillers.distiller import StepContext
from training.methods import KDiffusionSettings
from training.teachers import Teacher


@DISTILLERS.register("kdiffusion")
class KDiffusion(BranchedDistiller):
    """Each branch serves one step of the reverse process."""

    settings: KDiffusionSettings
    loss_name = "diffusion"

    def __init__(self, *, settings: KDiffusionSettings, student: Student, teacher: Teacher) -> None:
        super().__init__(settings=settings, student=student, teacher=teacher)
        self._schedule = SCHEDULES[settings.schedule](settings.num_branches)

    def distance(self, branches: list[Tensor], target: Tensor, step: StepContext, layer: int) -> Tensor:
        permutation = self._permutation(step, layer)
        return reverse_process_loss(branches, target, self._schedule, permutation, self.settings.trajectory)

    def _permutation(self, step: StepContext, layer: int) -> Permutation:
        if self.settings.permutation == "expected":
            return "expected"
        if self.settings.permutation == "fixed":
            return tuple(range(self.settings.num_branches))
        return [int(index) for index in step.orders[layer]]
