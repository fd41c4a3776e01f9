"""Run coroutines from tests that are ordinary functions."""

import asyncio
from collections.abc import Coroutine
from typing import Any


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of ``work``, which may take a minute."""
    return asyncio.run(asyncio.wait_for(work, 60))
