"""The bound on requests and bytes that are in progress together, and the bearer token."""

from pathlib import Path

import pytest

from kdexport.errors import RequestError, ServerError
from kdexport.serving.service import Admission, Settings, read_token


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


def test_a_weak_token_is_refused_and_never_shown(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("short")
    with pytest.raises(ServerError, match="at least 16"):
        read_token(tmp_path / "t")
    assert "0123456789abcdef" not in repr(Settings(token="0123456789abcdef"))
