"""Where branches are placed, as data that is read and written without torch."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Placement = Literal["R1", "R2"]
MAX_BRANCHES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchSpec:
    """Where branches are placed.

    ``R1`` puts ``num_branches`` copies of a convolution and its batch norm in their place. ``R2`` appends 1x1 adapters
    to ``adapter_channels`` after a feature; they fold into the layer that reads them.

    ``layers`` says where: ``single`` is the last stage, ``multi`` every stage of the student, a tuple of names exactly
    those: taps, or for R1 also paths of convolutions. ``adapter_channels`` is one number for all, or one for each.
    """

    placement: Placement
    num_branches: int
    adapter_channels: int | tuple[int, ...] | None = None
    layers: str | tuple[str, ...] = "single"

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "BranchSpec":
        """Inverse of ``to_json``; raises ``KeyError``, ``TypeError`` or ``ValueError`` on foreign data."""
        placement, count, layers = data["placement"], data["num_branches"], data.get("layers", "single")
        if placement not in get_args(Placement):
            raise ValueError(f"placement is {placement!r}, not one of {', '.join(get_args(Placement))}")
        if not _is_count(count):
            raise ValueError(f"num_branches is {count!r}, not a whole number")
        if not isinstance(layers, str) and not (layers and all(isinstance(name, str) for name in layers)):
            raise ValueError(f"layers is {layers!r}, not a name or a list of names")
        channels = data.get("adapter_channels")
        if not (channels is None or _is_count(channels) or (channels and all(_is_count(item) for item in channels))):
            raise ValueError(f"adapter_channels is {channels!r}, not a number or a list of numbers")
        unknown = data.keys() - {"placement", "num_branches", "adapter_channels", "layers"}
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        return cls(
            placement=placement,
            num_branches=count,
            adapter_channels=tuple(channels) if isinstance(channels, list | tuple) else channels,
            layers=layers if isinstance(layers, str) else tuple(layers),
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
