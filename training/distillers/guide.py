"""Target guide (eq. 14, corrected): the distance of student from teacher behind the teacher's own classifier."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.errors import ConfigError
from kdexport.students import Tapped
from training.quadratic import full_precision
from training.teachers import Teacher


class TargetGuide:
    """W_t pool(act(x)) of the teacher: its activation, its pooling, and the weight of its classifier.

    No module, so that the distiller that holds it neither trains nor stores the teacher; who calls keeps the teacher
    frozen and in evaluation mode, on the features' device.
    """

    def __init__(self, teacher: Teacher) -> None:
        """Raises ``ConfigError`` where the classifier does not read one value for each channel of the last feature."""
        self._teacher = teacher
        self._rectified: bool | None = None
        width, channels = self._classifier.in_features, teacher.taps[-1].channels
        if width != channels:
            raise ConfigError(
                f"target_guide needs a teacher whose classifier reads an average of each channel; this one's reads "
                f"{width} values of {channels} channels.",
                remedy="Set distiller.target_guide to 0, or choose another teacher.",
            )

    @property
    def _classifier(self) -> nn.Linear:
        return cast(nn.Linear, self._teacher.get_submodule(self._teacher.classifier_path))

    def calibrate(self, teacher_taps: Iterable[Tapped], teacher_feature: str) -> None:
        """Learn from a few batches whether the last stage ends with a ReLU.

        Raises ``ConfigError`` where it does not and ``teacher_feature`` is the pre-activation: the pooling does not
        read that.
        """
        name = self._teacher.taps[-1].name
        pairs = [(tapped.features[name], tapped.preactivations[name]) for tapped in teacher_taps]
        self._rectified = all(torch.equal(after, functional.relu(before)) for after, before in pairs)
        if teacher_feature == "pre_activation" and not self._rectified:
            raise ConfigError(
                "target_guide cannot start from a pre-activation here: the teacher's last stage does not end with a "
                "ReLU.",
                remedy="Set distiller.teacher_feature to 'post_activation', or distiller.target_guide to 0.",
            )

    def distance(self, student_features: Tensor, teacher_feature: Tensor) -> Tensor:
        """mean((W_t pool(act(x_0)) - W_t pool(act(x)))^2), a scalar, of (k,N,C,h,w) against (N,C,h,w).

        Both are in the teacher's own scale. The classifier's bias cancels.
        """
        if self._rectified is None:
            raise ValueError("calibrate the guide first: whether the teacher's last stage ends with a ReLU is unknown")
        with full_precision(teacher_feature.device):
            count, batch = student_features.shape[:2]
            pooled = torch.unflatten(self._pool(student_features.flatten(0, 1)), 0, (count, batch))
            difference = self._pool(teacher_feature) - pooled
            return functional.linear(difference, self._classifier.weight.detach()).square().mean()

    def _pool(self, feature: Tensor) -> Tensor:
        return self._teacher.pool(functional.relu(feature) if self._rectified else feature)
