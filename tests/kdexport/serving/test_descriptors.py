"""A server starts only with enough file descriptors for its connections."""

import resource
from typing import Any

import pytest

from kdexport.errors import ServerError
from kdexport.serving.descriptors import require_descriptors


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The limits that the process seems to have, and those that were set."""
    state: dict[str, Any] = {"now": (64, 4096), "set": None}

    def change(_: int, wanted: tuple[int, int]) -> None:
        if wanted[0] > wanted[1]:
            raise ValueError("current limit exceeds maximum limit")
        state["set"] = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda _: state["now"])
    monkeypatch.setattr(resource, "setrlimit", change)
    return state


def test_the_soft_limit_is_raised_as_far_as_connections_need(limits: dict[str, Any]) -> None:
    require_descriptors(512)
    assert limits["set"] == (1152, 4096)


def test_a_limit_that_is_high_enough_is_left_alone(limits: dict[str, Any]) -> None:
    for now in ((2000, 4096), (resource.RLIM_INFINITY, resource.RLIM_INFINITY)):
        limits["now"] = now
        require_descriptors(512)
    assert limits["set"] is None


def test_a_hard_limit_that_is_too_low_is_an_error(limits: dict[str, Any]) -> None:
    limits["now"] = (64, 64)
    with pytest.raises(ServerError) as caught:
        require_descriptors(512)
    assert caught.value.message == ("512 connections take up to 1152 file descriptors, but this process may open 64.")
    assert caught.value.remedy == "Raise its limit: ulimit -n 1152, or lower --connections."
