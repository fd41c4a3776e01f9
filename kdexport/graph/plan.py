"""Precision plans: the layers of a graph that stay float32, and the channels that are scaled by powers of two."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.errors import AuditError

#: float32 weights of a folded student by name.
Weights = Mapping[str, NDArray[np.float32]]

#: Ends the name of a weight in an ONNX file that is stored with its two axes swapped.
TRANSPOSED = ".T"


@dataclass(frozen=True, slots=True)
class Kept:
    """A layer that stays float32: its node and its weight, as the ONNX file names it."""

    node: str
    weight: str

    @property
    def trained(self) -> str:
        """The name of its weight in the folded student."""
        return self.weight.removesuffix(TRANSPOSED)


@dataclass(frozen=True, slots=True)
class Scaling:
    """Output channels of one layer divided by 2**exponents, inputs of the next one multiplied by the same factors.

    ``first`` names weight and bias (O,...) of the first layer, ``second`` the weight (O,I/groups,...) of the next.
    """

    first: tuple[str, ...]
    second: str
    groups: int
    exponents: tuple[int, ...]

    def apply(self, weights: dict[str, NDArray[np.float32]]) -> None:
        """Replace the tensors in ``weights`` by scaled ones; exact in float32 except for underflow and overflow."""
        for name in self.first:
            values = weights[name]
            weights[name] = np.ldexp(values, -self._column(values.ndim)).astype(np.float32)
        values = weights[self.second]
        shape = values.shape
        grouped = values.reshape(self.groups, shape[0] // self.groups, *shape[1:])
        up = np.asarray(self.exponents).reshape(self.groups, 1, shape[1], *[1] * (len(shape) - 2))
        weights[self.second] = np.ldexp(grouped, up).astype(np.float32).reshape(shape)

    def _column(self, dimensions: int) -> NDArray[np.int64]:
        return np.asarray(self.exponents, np.int64).reshape(-1, *[1] * (dimensions - 1))


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The layers that the file of a target keeps in float32, and the scalings of its float32 graph before the cast."""

    kept: tuple[Kept, ...] = ()
    equalised: tuple[Scaling, ...] = ()

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the kept nodes."""
        return tuple(layer.node for layer in self.kept)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights of the kept nodes in the folded student."""
        return tuple(layer.trained for layer in self.kept)

    def scaled(self, weights: Weights) -> dict[str, NDArray[np.float32]]:
        """The scaled weights of the student. Raises ``AuditError`` if the plan is for a different network."""
        result = dict(weights)
        try:
            for scaling in self.equalised:
                scaling.apply(result)
            missing = [layer.weight for layer in self.kept if layer.trained not in result]
        except (KeyError, ValueError, IndexError) as error:
            missing = [str(error)]
        if missing:
            raise AuditError(
                f"The precision plan is for a different student: {missing[0]} does not fit.",
                remedy="Build the bundle again.",
            )
        return result

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads back."""
        return {
            "kept": [asdict(layer) for layer in self.kept],
            "equalised": [
                {**asdict(s), "first": list(s.first), "exponents": list(s.exponents)} for s in self.equalised
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "LayerPlan":
        """Inverse of ``to_json``; ``KeyError``, ``TypeError`` or ``ValueError`` for malformed data."""
        return cls(
            tuple(Kept(str(item["node"]), str(item["weight"])) for item in data["kept"]),
            tuple(
                Scaling(
                    tuple(str(name) for name in item["first"]),
                    str(item["second"]),
                    int(item["groups"]),
                    tuple(int(exponent) for exponent in item["exponents"]),
                )
                for item in data["equalised"]
            ),
        )


#: The plan that changes nothing.
PLAIN = LayerPlan()
