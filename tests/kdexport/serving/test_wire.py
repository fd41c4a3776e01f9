"""The limit on the size of a request, and members that the protocol lets a client omit."""

import json
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from kdexport.serving.limits import Limits
from kdexport.serving.wire import (
    InferParameters,
    InferRequest,
    OutputParameters,
    RequestInput,
    RequestOutput,
    TensorParameters,
    all_finite,
    body_limit,
)
from tests.kdexport.serving.running_server import LIMITS, SIGNATURE


def test_a_request_may_be_as_large_as_the_model_needs_and_no_larger() -> None:
    raw = 8 * 12288
    assert raw < body_limit(SIGNATURE, LIMITS, binary=True) < 2 * raw + LIMITS.header
    longest = len(repr(float(np.float32(-1.2345678e-30)))) + 1
    assert body_limit(SIGNATURE, LIMITS, binary=False) >= 8 * 3072 * longest
    assert body_limit(SIGNATURE, Limits(body=5000), binary=True) == 5000


MESSAGES: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (InferRequest, {"inputs": [{"name": "a", "shape": [1], "datatype": "FP32"}]}),
    (RequestInput, {"name": "a", "shape": [1], "datatype": "FP32"}),
    (RequestOutput, {"name": "a"}),
    (TensorParameters, {}),
    (OutputParameters, {}),
    (InferParameters, {}),
]


@pytest.mark.parametrize(("kind", "least"), MESSAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_null_means_absent_for_every_optional_member_and_for_no_other(
    kind: type[BaseModel], least: dict[str, Any]
) -> None:
    assert {name for name, field in kind.model_fields.items() if field.is_required()} == least.keys()
    expected = kind.model_validate_json(json.dumps(least))
    schema = kind.model_json_schema()["properties"]
    for name in kind.model_fields.keys() - least.keys():
        assert kind.model_validate_json(json.dumps({**least, name: None})) == expected
        assert {"type": "null"} in schema[name].get("anyOf", [{"type": "null"}])
    for name in least:
        with pytest.raises(ValidationError):
            kind.model_validate_json(json.dumps({**least, name: None}))


@pytest.mark.parametrize("size", [1, 7, 9_999, 10_000, 10_001, 50_000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(size: int, bad: float) -> None:
    values = np.random.default_rng(size).normal(0, 1, (1, size)).astype(np.float32)
    assert all_finite(values)
    # Their squares are larger than float32 can be.
    huge = np.full_like(values, np.finfo(np.float32).max)
    assert all_finite(huge)
    assert all_finite(-huge)
    for place in {0, size // 2, size - 1}:
        for given in (values, huge):
            broken = given.copy()
            broken[0, place] = bad
            assert not all_finite(broken)
    assert all_finite(np.zeros((0, 3), np.float32))
    assert not all_finite(np.array([[np.inf, -np.inf], [np.nan, 0]], np.float32)[:, ::-1])
