"""Who gets in before a byte of a body is read: so many requests, so many bytes; everyone else hears 429 at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from kdexport.serving.errors import RequestError


class Admission:
    """Places and bytes of all requests that are inside; used on the event loop alone, so it needs no lock."""

    def __init__(self, *, places: int, bodies: int) -> None:
        self.places = places
        self.bodies = bodies
        self.inside = 0
        self.held = 0

    @contextmanager
    def enter(self, size: int) -> Iterator[None]:
        """A place and ``size`` bytes until the end of the block; raises ``RequestError`` with 429 where none is."""
        if self.inside >= self.places:
            raise RequestError(
                f"{self.inside} requests are inside (up to {self.places} allowed); try again.",
                status=429,
                reason="busy",
            )
        if self.held + size > self.bodies and self.inside:
            raise RequestError(
                f"Bodies of {self.held:,} bytes are inside, {size:,} more are too many (up to {self.bodies:,} "
                "allowed); try again.",
                status=429,
                reason="busy",
            )
        self.inside += 1
        self.held += size
        try:
            yield
        finally:
            self.inside -= 1
            self.held -= size
