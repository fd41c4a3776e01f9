"""The bound on requests and bytes that are in progress together."""

import pytest

from kdexport.errors import RequestError
from kdexport.serving.service import Admission


def test_places_and_bytes_are_given_back_whatever_happens() -> None:
    admission = Admission(places=2, bodies=100)
    with admission.enter(60):
        with pytest.raises(RequestError, match="60 bytes are inside, 41 more"), admission.enter(41):
            pass
        with admission.enter(40), pytest.raises(RequestError, match="2 requests are inside"), admission.enter(0):
            pass
    with pytest.raises(KeyError), admission.enter(7):
        raise KeyError
    assert (admission.inside, admission.held) == (0, 0)
    # One body larger than all of the budget is still served, alone.
    with admission.enter(1000):
        pass
