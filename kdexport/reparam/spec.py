"""Where branches sit, in words: read and written without torch."""

from dataclasses import dataclass
from typing import Literal

Placement = Literal["R1", "R2"]
MAX_BRANCHES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchSpec:
    """Where branches sit.

    ``R1`` puts ``num_branches`` copies of the student's last convolution and batch norm in their place. ``R2`` appends
    1x1 adapters to ``adapter_channels`` before the pooling; they fold through it into the classifier.
    """

    placement: Placement
    num_branches: int
    adapter_channels: int | None = None
