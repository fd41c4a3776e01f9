"""Contrastive representation distillation (Tian et al., 2020, CRD).

For each image, each network learns to distinguish the image's embedding in the memory of the other network from those
of images of other classes. The memory has one embedding for each network and training image.
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


class NegativeSampler(nn.Module):
    """Draws indices of images of other classes, without replacement and independently for each image of a batch.

    A step uses one permutation of the set. For each image, the permutation without the image's own class is a circle,
    of which the image gets ``count`` consecutive entries from a random start. So the negatives of each image are a
    uniformly random subset. Given the permutation, the subsets of two images are independent and every index is equally
    likely, so the covariances between images are zero: mean and covariance of the gradient of a batch are those of
    separate draws, without a random key for each pair of image and index. The start depends on the index of the image
    and on the global generator, which is the same in all processes, so the negatives of an image do not depend on the
    process that trains on it.
    """

    labels: Tensor
    sizes: Tensor
    firsts: Tensor

    def __init__(self, labels: Tensor, count: int) -> None:
        super().__init__()
        sizes = torch.bincount(labels)
        self._largest = int(sizes.max())
        # The same for all classes, so that shapes do not change between steps.
        self.count = min(count, len(labels) - self._largest)
        if self.count < 1:
            raise DataError(
                f"The distiller crd needs at least 2 classes, but all {len(labels)} training images are of one.",
                remedy="Train on 2 classes or more, or choose another distiller.name.",
            )
        self.register_buffer("labels", labels)
        self.register_buffer("sizes", sizes)
        self.register_buffer("firsts", sizes.cumsum(0) - sizes)

    def forward(self, samples: Tensor) -> Tensor:
        """The indices (B,K) of the negatives of the images ``samples`` (B,), in random order."""
        total, device = len(self.labels), samples.device
        permuted = torch.randperm(total, device=device)
        classes = self.labels[samples]
        others = (total - self.sizes[classes])[:, None]
        # In double precision each of a million starts is equally likely.
        starts = (torch.rand(total, 1, dtype=torch.float64, device=device)[samples] * others).long()
        ranks = (starts + torch.arange(self.count, device=device)) % others
        return permuted[ranks + torch.searchsorted(self._before(permuted, classes), ranks, right=True)]

    def _before(self, permuted: Tensor, classes: Tensor) -> Tensor:
        """(B,M) ascending: the number of images of other classes before each image of ``classes`` in the permutation.

        The image with rank r among the other classes has the position r plus the number of these values up to r.
        """
        # Grouped by class, ascending in each.
        positions = self.labels[permuted].argsort(stable=True)
        span = torch.arange(self._largest, device=permuted.device)
        own = positions[(self.firsts[classes, None] + span).clamp(max=len(permuted) - 1)] - span
        return torch.where(span < self.sizes[classes, None], own, len(permuted))


class ContrastMemory(nn.Module):
    """The latest embeddings of n training images by both networks, as unit vectors in two banks (n,D).

    Its tensors are equal in all processes: each process stores the embeddings of all of them.
    """

    student: Tensor
    teacher: Tensor
    normaliser: Tensor

    def __init__(self, labels: Tensor, *, dimension: int, negatives: int, temperature: float, momentum: float) -> None:
        super().__init__()
        self._temperature, self._momentum = temperature, momentum
        self.others = NegativeSampler(labels, negatives)
        bound = (dimension / 3) ** -0.5
        for name in ("student", "teacher"):
            self.register_buffer(name, torch.empty(len(labels), dimension).uniform_(-bound, bound))
        #: Z of the student against the teacher's bank and of the teacher against the student's; 0 until the first step.
        self.register_buffer("normaliser", torch.zeros(2))

    def forward(self, student: Tensor, teacher: Tensor, samples: Tensor) -> Tensor:
        """The loss () of unit vectors (B,D) of the images ``samples`` (B,); stores the vectors in training mode.

        Each network is contrasted with the bank of the other one: P = exp(<v,m>/T)/Z for the image itself and K others
        (Tian et al., 2020), where Z = n mean(exp(<v,m>/T)) over the first batch of all processes.
        """
        chosen = torch.cat([samples[:, None], self.others(samples)], 1)
        pairs = ((student, self.teacher), (teacher, self.student))
        found = torch.stack([similarities(vectors, bank, chosen) for vectors, bank in pairs])
        raw = torch.exp(found / self._temperature)
        normaliser = self._normaliser(raw.detach())
        # The mean over the images of both networks; the loss is the sum of the means.
        loss = 2 * contrastive_nce_loss((raw / normaliser[:, None, None]).flatten(0, 1), len(self.student))
        if self.training:
            self._store(student.detach(), teacher.detach(), samples, normaliser)
        return loss

    def _normaliser(self, raw: Tensor) -> Tensor:
        """The stored Z (2,), or that of a batch (2,B,1+K) if there is none; the host does not wait for the choice."""
        means = raw.mean((1, 2))
        here = gathered(means[None]).mean(0) * len(self.student)
        return torch.where(self.normaliser > 0, self.normaliser, here)

    @torch.no_grad()
    def _store(self, student: Tensor, teacher: Tensor, samples: Tensor, normaliser: Tensor) -> None:
        self.normaliser.copy_(normaliser)
        indices = gathered(samples)
        embeddings = gathered(torch.cat([student, teacher], 1)).chunk(2, 1)
        for bank, new in zip((self.student, self.teacher), embeddings, strict=True):
            mixed = self._momentum * bank[indices] + (1 - self._momentum) * new
            bank.index_copy_(0, indices, functional.normalize(mixed))


def similarities(vectors: Tensor, bank: Tensor, chosen: Tensor) -> Tensor:
    """Inner products (B,C) of ``vectors`` (B,D) with the rows ``chosen`` (B,C) of the constant ``bank`` (n,D).

    Computing all B x n products and choosing among them moves far less memory than a copy of B x C rows.
    """
    # A copy, because the bank is overwritten before the backward pass reads it.
    return (vectors @ bank.clone().T).gather(1, chosen)


@DISTILLERS.register("crd")
class CRD(Distiller):
    """Contrasts the pooled vectors of each network, projected to one space, with the memory of the other network.

    With several processes the memory is the same in all of them; an image may occur only once in a global batch.
    """

    settings: CRDSettings
    reads = frozenset(("pooled",))
    reads_of_student = frozenset(("pooled",))
    # The memory of an image is of the image alone, and is updated once a step.
    needs_one_class = needs_distinct_images = True
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
        # The exponent is divided by T, which multiplies rounding errors: low precision would change the probabilities.
        with full_precision(student.pooled.device):
            own = _embedded(self.student_projection, student.pooled)
            given = _embedded(self.teacher_projection, teacher.pooled)
            loss = self.memory(own, given, step.samples)
        return {"crd": self.scale(step) * loss}


def _embedded(projection: nn.Linear, pooled: Tensor) -> Tensor:
    return functional.normalize(projection(pooled.to(projection.weight.dtype)))
