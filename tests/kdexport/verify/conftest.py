import copy

import pytest

from kdexport.reparam.fold_student import fuse_student
from kdexport.verify.reference import make_probes, make_reference
from tests.kdexport.hostile_values import randomize
from tests.kdexport.verify.small_ladder import PREPROCESSING, Ladder, SmallNet, pixels


@pytest.fixture(scope="session")
def ladder() -> Ladder:
    unfused = randomize(SmallNet(), seed=8).eval()
    folded = fuse_student(copy.deepcopy(unfused), input_shape=(2, 3, 16, 16))
    probes = make_probes(pixels(23), PREPROCESSING)
    reference = make_reference(unfused, folded.module, probes, forms=("fp16", "bf16", "int8-u8", "int8-s8"))
    return Ladder(unfused, folded.module, folded.certificate, probes, reference)
