"""The answers of a file on validation images, for the benchmarks of int8."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdexport.data.datasets import ImageSet
from kdexport.data.preprocessing import Preprocessing
from kdexport.verify.target_checks import open_file

_BATCH = 64


def answers_of(
    path: Path, form: str, images: ImageSet, chosen: Sequence[int], preprocessing: Preprocessing
) -> NDArray[np.int64]:
    """The classes (n,) that the file ``path`` in ``form`` gives the images ``chosen``."""
    model = open_file(path, form)
    starts = range(0, len(chosen), _BATCH)
    read = (preprocessing.normalise(images.read(chosen[s : s + _BATCH], preprocessing)) for s in starts)
    return np.concatenate([model.logits(batch).argmax(1) for batch in read])
