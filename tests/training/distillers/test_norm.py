"""N-to-one matching, computed again in numpy from the text of the paper."""

import pytest

from kdexport.students import Tapped
from tests.kdexport.hostile_values import noise
from tests.training.distillers.numpy_layers import array, averaged, bridged, peaks
from tests.training.distillers.stage_networks import COUNT, build, loss_of, random_outputs, small
from training.losses import many_to_one_loss


@pytest.mark.parametrize(
    ("student", "teacher", "size", "side"), [("mobilenetv2", "resnet8", 40, 3), ("resnet18", "vgg8", 21, 3)]
)
def test_norm_matches_every_segment_with_the_teachers_peaks(student: str, teacher: str, size: int, side: int) -> None:
    ours, theirs = small(student, teacher, size)
    distiller = build("norm", ours, theirs, num_segments=3, weight=0.6)
    student_out, teacher_out = random_outputs(ours, theirs)
    feature = averaged(array(student_out.last), side, side)
    wide = bridged(feature, distiller, "expansion")
    target = peaks(array(teacher_out.last), side)
    width = theirs.taps[-1].channels
    expected = sum(((wide[:, i * width : (i + 1) * width] - target) ** 2).mean() for i in range(3))
    assert loss_of(distiller, student_out, teacher_out) == pytest.approx(0.6 * expected, rel=1e-10)


def test_a_larger_student_map_is_averaged_to_the_teachers() -> None:
    student, teacher = small("mobilenetv2", "resnet8", 40)
    distiller = build("norm", student, teacher, num_segments=2)
    student_out, teacher_out = random_outputs(student, teacher)
    shrunk = Tapped(
        features={"stage3": teacher_out.last[:, :, :2, :1]},
        preactivations={},
        pooled=teacher_out.pooled,
        logits=teacher_out.logits,
    )
    wide = bridged(averaged(array(student_out.last), 2, 1), distiller, "expansion").reshape(COUNT, 2, -1, 2, 1)
    expected = ((wide - array(shrunk.last)[:, None]) ** 2).mean((0, 2, 3, 4)).sum()
    assert loss_of(distiller, student_out, shrunk) == pytest.approx(expected, rel=1e-10)


def test_many_to_one_is_zero_for_copies_and_refuses_a_part_of_a_segment() -> None:
    teacher = noise(3, 5, 2, 7)
    assert many_to_one_loss(teacher.repeat(1, 4, 1, 1), teacher).item() == 0
    # Segments lie one after another: interleaved copies are others.
    assert many_to_one_loss(teacher.repeat_interleave(4, 1), teacher).item() > 0.1
    for wrong in (noise(3, 12, 2, 7), noise(3, 5, 7, 2), noise(2, 5, 2, 7), noise(3, 3, 2, 7)):
        with pytest.raises(ValueError, match="does not match the teacher's"):
            many_to_one_loss(wrong, teacher)
