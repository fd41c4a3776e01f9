"""The images that int8 is calibrated on: of the training split, without augmentation, spread over all classes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kdexport.core.toml import Settings
from kdexport.data.datasets import DatasetSpec, open_dataset, spread
from kdexport.data.preprocessing import Preprocessing


class CalibrationSettings(Settings):
    """``[calibration]``: how int8 finds the range of each tensor, always on training images."""

    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    images: Annotated[int, Field(ge=1, le=100_000)] = 256
    #: For ``percentile``: how many per cent of the values an activation's levels hold.
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    #: Bits of a weight for CPUs. With 8, processors without VNNI saturate inside OpenVINO and in Triton.
    weight_bits: Literal[7, 8] = 7


_BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What is measured on: a data set, of which only the training split is ever opened, and how many images of it."""

    settings: CalibrationSettings
    dataset: DatasetSpec
    dataset_sha256: str
    preprocessing: Preprocessing

    def batches(self) -> Iterator[NDArray[np.float32]]:
        """Normalised images (16,3,S,S), evenly spread over the set; fewer where the set has fewer."""
        images = open_dataset(self.dataset, "train")
        chosen = self._chosen(len(images))
        for start in range(0, len(chosen), _BATCH):
            yield self.preprocessing.normalise(images.read(chosen[start : start + _BATCH], self.preprocessing))

    def search_images(self, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Normalised training images (n,3,S,S) and their labels (n,), evenly spread, those of ``batches`` left out.

        Where the set has no others, the same images serve twice.
        """
        images = open_dataset(self.dataset, "train")
        everything = np.arange(len(images))
        others = np.setdiff1d(everything, self._chosen(len(images)))
        pool = others if len(others) else everything
        chosen = [int(index) for index in pool[spread(len(pool), count)]]
        return self.preprocessing.normalise(images.read(chosen, self.preprocessing)), images.labels[chosen]

    def _chosen(self, total: int) -> list[int]:
        # A set is often sorted by class, and some classes have a smaller range than others.
        return spread(total, self.settings.images)

    def to_json(self) -> dict[str, object]:
        """What the manifest says about it."""
        return {**self.settings.model_dump(mode="json"), "split": "train", "dataset_sha256": self.dataset_sha256}
