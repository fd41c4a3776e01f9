"""Calibration images for int8: from the training split, without augmentation, evenly spread over all classes."""

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
    """``[calibration]``: how the range of each tensor is measured, always on training images."""

    #: ``auto`` compares the others, for each form of int8.
    method: Literal["minmax", "entropy", "percentile", "auto"] = "auto"
    images: Annotated[int, Field(ge=1, le=100_000)] = 256
    #: For ``percentile``: the percentage of values inside the range of an activation.
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    #: Bits of a weight for CPUs. With 8 bits, sums saturate on processors without VNNI in OpenVINO and in Triton.
    weight_bits: Literal[7, 8] = 7


_BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """A data set, of which only the training split is opened, and the settings of the calibration."""

    settings: CalibrationSettings
    dataset: DatasetSpec
    dataset_sha256: str
    preprocessing: Preprocessing

    def batches(self) -> Iterator[NDArray[np.float32]]:
        """Normalised images in batches (16,3,S,S) or smaller, evenly spread over the set; all if it has fewer."""
        images = open_dataset(self.dataset, "train")
        chosen = self._chosen(len(images))
        for start in range(0, len(chosen), _BATCH):
            yield self.preprocessing.normalise(images.read(chosen[start : start + _BATCH], self.preprocessing))

    def search_images(self, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Normalised training images (n,3,S,S) and their labels (n,), evenly spread, without those of ``batches``.

        If ``batches`` uses all images of the set, the same images are used again.
        """
        images = open_dataset(self.dataset, "train")
        everything = np.arange(len(images))
        others = np.setdiff1d(everything, self._chosen(len(images)))
        pool = others if len(others) else everything
        chosen = [int(index) for index in pool[spread(len(pool), count)]]
        return self.preprocessing.normalise(images.read(chosen, self.preprocessing)), images.labels[chosen]

    def _chosen(self, total: int) -> list[int]:
        # A set is often sorted by class, and ranges differ between classes.
        return spread(total, self.settings.images)

    def to_json(self) -> dict[str, object]:
        """The entry of the manifest."""
        return {**self.settings.model_dump(mode="json"), "split": "train", "dataset_sha256": self.dataset_sha256}
