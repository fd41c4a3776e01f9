"""The target guide (eq. 14, corrected): the distance between student and teacher after the teacher's classifier."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.errors import ConfigError
from kdexport.students import Tapped
from training.devices import gathered
from training.quadratic import full_precision
from training.teachers import Teacher


class TargetGuide:
    """W_t pool(act(x)) with the activation, the pooling and the classifier's weight of the teacher.

    It is not a module, so a distiller with a guide neither trains nor stores the teacher. The caller keeps the teacher
    frozen, in evaluation mode, and on the device of the features.
    """

    def __init__(self, teacher: Teacher) -> None:
        """Raises ``ConfigError`` unless the classifier reads one value for each channel of the last feature."""
        self._teacher = teacher
        self._rectified: bool | None = None
        #: The numbers of batches, and of those in which the last stage ended with a ReLU.
        self._observed = torch.zeros(2, dtype=torch.int64)
        width, channels = self._classifier.in_features, teacher.taps[-1].channels
        if width != channels:
            raise ConfigError(
                "distiller.target_guide needs a teacher whose classifier reads one value for each channel, but this "
                f"one reads {width} values of {channels} channels.",
                remedy="Set distiller.target_guide to 0, or choose another teacher.",
            )

    @property
    def _classifier(self) -> nn.Linear:
        return cast(nn.Linear, self._teacher.get_submodule(self._teacher.classifier_path))

    def calibrate(self, teacher_taps: Iterable[Tapped], teacher_feature: str) -> None:
        """Find out from a few batches whether the last stage ends with a ReLU; raises ``ConfigError`` as ``decide``."""
        for tapped in teacher_taps:
            self.observe(tapped)
        self.decide(teacher_feature)

    def observe(self, tapped: Tapped) -> None:
        """Take a batch into what ``decide`` decides."""
        name = self._teacher.taps[-1].name
        after, before = tapped.features[name], tapped.preactivations[name]
        self._observed += torch.tensor([1, int(torch.equal(after, functional.relu(before)))])

    def decide(self, teacher_feature: str) -> None:
        """Decide whether the last stage ends with a ReLU: whether it did in each batch of all processes.

        Raises ``ConfigError`` if it does not and ``teacher_feature`` is "pre_activation", which the pooling does not
        read.
        """
        observed, rectified = gathered(self._observed[None].to(self._classifier.weight.device)).sum(0).tolist()
        self._rectified = observed == rectified
        if teacher_feature == "pre_activation" and not self._rectified:
            raise ConfigError(
                "distiller.target_guide cannot use teacher_feature 'pre_activation' with this teacher: its last stage "
                "does not end with a ReLU, so its pooling does not read the pre-activation.",
                remedy="Set distiller.teacher_feature to 'post_activation', or distiller.target_guide to 0.",
            )

    def distance(self, student_features: Tensor, teacher_feature: Tensor) -> Tensor:
        """mean((W_t pool(act(x_0)) - W_t pool(act(x)))^2), a scalar, of (k,N,C,h,w) against (N,C,h,w).

        Both are in the scale of the teacher. The bias of the classifier cancels.
        """
        if self._rectified is None:
            raise ValueError("call calibrate() before distance(): it finds out whether the last stage ends with a ReLU")
        with full_precision(teacher_feature.device):
            count, batch = student_features.shape[:2]
            pooled = torch.unflatten(self._pool(student_features.flatten(0, 1)), 0, (count, batch))
            difference = self._pool(teacher_feature) - pooled
            return functional.linear(difference, self._classifier.weight.detach()).square().mean()

    def _pool(self, feature: Tensor) -> Tensor:
        return self._teacher.pool(functional.relu(feature) if self._rectified else feature)
