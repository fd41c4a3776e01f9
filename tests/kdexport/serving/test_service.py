"""The bound on requests and bytes that are in progress together, and the bearer token."""

from pathlib import Path

import pytest

from kdexport.errors import RequestError, ServerError
from kdexport.serving.service import Admission, Settings, read_token


def test_places_and_bytes_are_released_even_after_an_error() -> None:
    admission = Admission(places=2, bodies=100)
    too_many_bytes = (
        r"^The server is at capacity: the bodies of requests in progress have up to 60 bytes, and this one up to 41 "
        r"\(limit 100 together\)\.\nRetry later\.$"
    )
    too_many_requests = r"^The server is at capacity: 2 requests in progress \(limit 2\)\.\nRetry later\.$"
    with admission.enter(60):
        with pytest.raises(RequestError, match=too_many_bytes), admission.enter(41):
            pass
        with admission.enter(40), pytest.raises(RequestError, match=too_many_requests), admission.enter(0):
            pass
    with pytest.raises(KeyError), admission.enter(7):
        raise KeyError
    assert (admission.in_progress, admission.reserved) == (0, 0)
    # A single body larger than the whole budget is still served, alone.
    with admission.enter(1000):
        pass


def test_bytes_are_charged_as_they_arrive_and_a_request_that_is_alone_is_not_refused() -> None:
    admission = Admission(places=9, bodies=100)
    with admission.enter() as first:
        first.charge(120)
        with admission.enter() as second, pytest.raises(RequestError) as caught:
            second.charge(1)
        assert caught.value.status == 429
        assert admission.reserved == 120
    with admission.enter() as first, admission.enter() as second:
        first.charge(60)
        second.charge(40)
        with pytest.raises(RequestError, match="have up to 60 bytes, and this one up to 41 "):
            second.charge(1)
    assert (admission.in_progress, admission.reserved) == (0, 0)


def test_a_weak_token_is_refused_and_never_shown(tmp_path: Path) -> None:
    token = tmp_path / "t"
    token.write_text("short")
    with pytest.raises(ServerError, match=r"The token in .*/t has 5 characters \(at least 16 required\)\."):
        read_token(token)
    token.write_text("l\u00f6ng" * 8)
    with pytest.raises(ServerError, match=r"The token in .*/t has characters outside ASCII; only ASCII is allowed\."):
        read_token(token)
    with pytest.raises(ServerError, match=r"The token file .*/none cannot be read: No such file or directory\."):
        read_token(tmp_path / "none")
    assert "0123456789abcdef" not in repr(Settings(token="0123456789abcdef"))
