"""Stages of the student paired with stages of the teacher, and their maps brought to one size."""

import numpy as np
import pytest

from kdexport.students import Tap
from tests.kdexport.hostile_values import noise
from tests.training.distillers.numpy_layers import array, averaged
from tests.training.distillers.stage_networks import small
from training.distillers.pairs import average_to_smaller, stage_pairs


@pytest.mark.parametrize(
    ("teacher", "student", "size", "expected"),
    [
        ("resnet32x4", "shufflenetv2", 32, "116@16<-64@32 232@8<-128@16 464@4<-256@8"),
        ("wrn40_2", "shufflenetv1", 32, "240@16<-32@32 480@8<-64@16 960@4<-128@8"),
        ("vgg13", "mobilenetv2", 32, "12@16<-128@16 16@8<-256@8 48@4<-512@4 160@2<-512@4"),
        ("resnet50", "mobilenetv2", 32, "12@16<-256@32 16@8<-512@16 48@4<-1024@8 160@2<-2048@4"),
        ("resnet56", "mobilenetv2", 32, "16@8<-16@32 48@4<-32@16 160@2<-64@8"),
        ("swin_t", "mobilenetv3", 224, "24@56<-96@56 40@28<-192@28 112@14<-384@14 160@7<-768@7"),
        ("swin_t", "resnet18", 224, "64@56<-96@56 128@28<-192@28 256@14<-384@14 512@7<-768@7"),
        ("swin_t", "shufflenetv2", 224, "116@28<-192@28 232@14<-384@14 464@7<-768@7"),
    ],
)
def test_stages_are_paired_from_the_deep_end(teacher: str, student: str, size: int, expected: str) -> None:
    def text(tap: Tap) -> str:
        return f"{tap.channels}@{size // tap.stride}"

    pairs = stage_pairs(*small(student, teacher, size))
    assert " ".join(f"{text(pair.student)}<-{text(pair.teacher)}" for pair in pairs) == expected


def test_the_larger_map_is_averaged_in_each_direction_by_itself() -> None:
    a, b = noise(2, 3, 7, 4), noise(2, 5, 3, 9)
    ours, theirs = average_to_smaller(a, b)
    np.testing.assert_allclose(array(ours), averaged(array(a), 3, 4), rtol=1e-12)
    np.testing.assert_allclose(array(theirs), averaged(array(b), 3, 4), rtol=1e-12)
