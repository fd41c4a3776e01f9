"""The limit on the size of a request."""

import numpy as np

from kdexport.serving.limits import Limits
from kdexport.serving.wire import body_limit
from tests.kdexport.serving.running_server import LIMITS, SIGNATURE


def test_a_request_may_be_as_large_as_the_model_needs_and_no_larger() -> None:
    raw = 8 * 12288
    assert raw < body_limit(SIGNATURE, LIMITS, binary=True) < 2 * raw + LIMITS.header
    longest = len(repr(float(np.float32(-1.2345678e-30)))) + 1
    assert body_limit(SIGNATURE, LIMITS, binary=False) >= 8 * 3072 * longest
    assert body_limit(SIGNATURE, Limits(body=5000), binary=True) == 5000
