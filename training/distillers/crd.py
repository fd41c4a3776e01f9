"""Contrastive representation distillation (Tian et al., 2020): which image a pooled vector is of, among many.

Memory of one embedding per training image and network, and the negatives that are drawn from it (CRD).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.errors import DataError
from kdexport.students import Student, Tapped
from training.devices import gathered
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.distillers.pairs import pooled_width
from training.distillers.settings import CRDSettings
from training.losses import contrastive_nce_loss
from training.quadratic import full_precision
from training.teachers import Teacher


class OtherClasses(nn.Module):
    """Draws places of images of other classes, without replacement and independently for each image of a batch.

    One permutation of the set serves a step. Without the image's own class it is a circle, of which the image takes
    ``count`` in a row from a start of its own. Each image so has a uniformly random subset; given the permutation, two
    images' draws are independent and every place is as likely as any other, so that all covariances between images are
    zero: the mean and the covariance of a batch's gradient are those of separate draws, without a random key for each
    pair of image and place. Starts go by the image's place in the set and come from the global generator, which is the
    same in all processes: what an image meets does not depend on which of them has it.
    """

    labels: Tensor
    sizes: Tensor
    firsts: Tensor

    def __init__(self, labels: Tensor, count: int) -> None:
        super().__init__()
        sizes = torch.bincount(labels)
        self._largest = int(sizes.max())
        # One number for all classes, so that shapes do not change from step to step.
        self.count = min(count, len(labels) - self._largest)
        if self.count < 1:
            raise DataError(
                f"All {len(labels)} training images are of one class, and crd contrasts images of several.",
                remedy="Train on two classes or more, or choose another distiller.",
            )
        self.register_buffer("labels", labels)
        self.register_buffer("sizes", sizes)
        self.register_buffer("firsts", sizes.cumsum(0) - sizes)

    def forward(self, samples: Tensor) -> Tensor:
        """Places (B,) in the set to those of their negatives (B,K), in random order."""
        total, device = len(self.labels), samples.device
        permuted = torch.randperm(total, device=device)
        classes = self.labels[samples]
        others = (total - self.sizes[classes])[:, None]
        # In double precision each of a million starts is as likely as any other.
        starts = (torch.rand(total, 1, dtype=torch.float64, device=device)[samples] * others).long()
        ranks = (starts + torch.arange(self.count, device=device)) % others
        return permuted[ranks + torch.searchsorted(self._before(permuted, classes), ranks, right=True)]

    def _before(self, permuted: Tensor, classes: Tensor) -> Tensor:
        """(B,M) ascending: how many images of other classes lie before each one of ``classes`` in the permutation.

        The image of rank r among the others lies r places plus one for each entry that is at most r from the start.
        """
        # Grouped by class, ascending in each.
        positions = self.labels[permuted].argsort(stable=True)
        span = torch.arange(self._largest, device=permuted.device)
        own = positions[(self.firsts[classes, None] + span).clamp(max=len(permuted) - 1)] - span
        return torch.where(span < self.sizes[classes, None], own, len(permuted))


class ContrastMemory(nn.Module):
    """What both networks said of each of n training images when it was last seen, as unit vectors (n,D) in two banks.

    Its tensors are equal in all processes at all times: every one takes in what all of them saw.
    """

    student: Tensor
    teacher: Tensor
    normaliser: Tensor

    def __init__(self, labels: Tensor, *, dimension: int, negatives: int, temperature: float, momentum: float) -> None:
        super().__init__()
        self._temperature, self._momentum = temperature, momentum
        self.others = OtherClasses(labels, negatives)
        bound = (dimension / 3) ** -0.5
        for name in ("student", "teacher"):
            self.register_buffer(name, torch.empty(len(labels), dimension).uniform_(-bound, bound))
        #: Z of the student against the teacher's bank and of the teacher against the student's; 0 until the first step.
        self.register_buffer("normaliser", torch.zeros(2))

    def forward(self, student: Tensor, teacher: Tensor, samples: Tensor) -> Tensor:
        """Unit vectors (B,D) of images at places (B,) to the loss (), then remembers them.

        Both networks are contrasted with the other one's bank: P = exp(<v,m>/T)/Z of the image itself and of K others
        (Tian et al., 2020), where Z = n mean(exp(<v,m>/T)) of the first batch of all processes.
        """
        chosen = torch.cat([samples[:, None], self.others(samples)], 1)
        pairs = ((student, self.teacher), (teacher, self.student))
        raw = [torch.exp(similarities(vectors, bank, chosen) / self._temperature) for vectors, bank in pairs]
        normaliser = self._normaliser(raw)
        losses = [
            contrastive_nce_loss(values / z, len(bank))
            for values, z, (_, bank) in zip(raw, normaliser, pairs, strict=True)
        ]
        if self.training:
            self._remember(student.detach(), teacher.detach(), samples, normaliser)
        return losses[0] + losses[1]

    def _normaliser(self, raw: list[Tensor]) -> Tensor:
        """The kept Z (2,), or that of this batch where none is kept: a choice that the host need not wait for."""
        means = torch.stack([values.detach().mean() for values in raw])
        here = gathered(means[None]).mean(0) * len(self.student)
        return torch.where(self.normaliser > 0, self.normaliser, here)

    @torch.no_grad()
    def _remember(self, student: Tensor, teacher: Tensor, samples: Tensor, normaliser: Tensor) -> None:
        self.normaliser.copy_(normaliser)
        places = gathered(samples)
        vectors = gathered(torch.cat([student, teacher], 1)).chunk(2, 1)
        for bank, seen in zip((self.student, self.teacher), vectors, strict=True):
            mixed = self._momentum * bank[places] + (1 - self._momentum) * seen
            bank.index_copy_(0, places, functional.normalize(mixed))


def similarities(vectors: Tensor, bank: Tensor, chosen: Tensor) -> Tensor:
    """Inner products (B,C) of ``vectors`` (B,D) with the rows ``chosen`` (B,C) of ``bank`` (n,D), which is a constant.

    All B x n products and a choice among them move far less memory than a copy of B x C rows.
    """
    # The bank is overwritten before the backward pass reads it.
    return (vectors @ bank.clone().T).gather(1, chosen)


@DISTILLERS.register("crd")
class CRD(Distiller):
    """Pooled vectors of both networks, projected to one space, against the memory of each other.

    In several processes the memory is the same in all of them, and an image may be in a global batch once.
    """

    settings: CRDSettings
    memory: ContrastMemory

    def __init__(self, *, settings: CRDSettings, student: Student, teacher: Teacher) -> None:
        super().__init__(settings=settings, student=student, teacher=teacher)
        self.student_projection = nn.Linear(pooled_width(student), settings.dimension)
        self.teacher_projection = nn.Linear(pooled_width(teacher), settings.dimension)

    def prepare(self, labels: Tensor) -> None:
        settings = self.settings
        self.memory = ContrastMemory(
            labels,
            dimension=settings.dimension,
            negatives=settings.negatives,
            temperature=settings.temperature,
            momentum=settings.momentum,
        )

    def forward(
        self,
        student: Tapped,
        branches: BranchFeatures,  # noqa: ARG002
        teacher: Tapped,
        step: StepContext,
    ) -> dict[str, Tensor]:
        # Exponentials of 1/T times a rounding error: low precision would end in other probabilities.
        with full_precision(student.pooled.device):
            own = _embedded(self.student_projection, student.pooled)
            given = _embedded(self.teacher_projection, teacher.pooled)
            loss = self.memory(own, given, step.samples)
        return {"crd": self.scale(step) * loss}


def _embedded(projection: nn.Linear, pooled: Tensor) -> Tensor:
    return functional.normalize(projection(pooled.to(projection.weight.dtype)))
