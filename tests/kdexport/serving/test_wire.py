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
