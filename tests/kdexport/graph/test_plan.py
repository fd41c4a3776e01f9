"""What a plan does to weights, written out channel by channel; plans of other networks are refused."""

import json

import numpy as np
import pytest

from kdexport.errors import AuditError
from kdexport.graph.plan import Kept, LayerPlan, Scaling, Weights

EXPONENTS = (3, 0, -2, 5, 1, -7)


def weights(groups: int) -> Weights:
    rng = np.random.default_rng(9)
    shapes = {"a.weight": (6, 4, 3, 3), "a.bias": (6,), "b.weight": (4 * groups, 6 // groups, 3, 3), "b.bias": (4,)}
    return {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def plan(groups: int) -> LayerPlan:
    return LayerPlan((Kept("node_b", "b.weight"),), (Scaling(("a.weight", "a.bias"), "b.weight", groups, EXPONENTS),))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_each_channel_is_divided_before_and_multiplied_after(groups: int) -> None:
    before = weights(groups)
    after = plan(groups).scaled(before)
    for channel, exponent in enumerate(EXPONENTS):
        factor = np.float32(2.0**exponent)
        np.testing.assert_array_equal(after["a.weight"][channel] * factor, before["a.weight"][channel])
        np.testing.assert_array_equal(after["a.bias"][channel] * factor, before["a.bias"][channel])
        group, place = divmod(channel, 6 // groups)
        rows = slice(4 * group, 4 * group + 4)
        np.testing.assert_array_equal(after["b.weight"][rows, place], before["b.weight"][rows, place] * factor)
    assert all(values.dtype == np.float32 for values in after.values())
    np.testing.assert_array_equal(after["b.bias"], before["b.bias"])
    np.testing.assert_array_equal(before["a.weight"], weights(groups)["a.weight"])


def test_a_plan_survives_json() -> None:
    found = LayerPlan.from_json(json.loads(json.dumps(plan(2).to_json())))
    assert found == plan(2)
    assert (found.nodes, found.weights) == (("node_b",), ("b.weight",))


@pytest.mark.parametrize(
    "foreign",
    [
        LayerPlan(kept=(Kept("c", "c.weight"),)),
        LayerPlan(equalised=(Scaling(("c.weight",), "b.weight", 1, EXPONENTS),)),
        LayerPlan(equalised=(Scaling(("a.weight", "a.bias"), "b.weight", 1, EXPONENTS[:5]),)),
        LayerPlan(equalised=(Scaling(("a.weight", "a.bias"), "b.weight", 5, EXPONENTS),)),
    ],
)
def test_a_plan_of_another_network_is_refused(foreign: LayerPlan) -> None:
    with pytest.raises(AuditError, match=r"The precision plan is for a different student: .* does not fit"):
        foreign.scaled(weights(1))
