"""The body of a request: read in parts, limited, decompressed, and abandoned when the client disconnects."""

import asyncio
import os
import zlib
from typing import Any

import pytest

from kdexport.errors import RequestError
from kdexport.serving.limits import Limits
from kdexport.serving.requests import ClientDisconnectedError, cancel_on_disconnect, decompress, read_body
from tests.kdexport.serving.event_loop import run


def receiver(*messages: dict[str, Any]) -> Any:
    pending = list(messages)

    async def receive() -> dict[str, Any]:
        if not pending:
            await asyncio.sleep(60)
        return pending.pop(0)

    return receive


def part(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


def test_a_body_is_read_in_parts_and_bounded_by_bytes_chunks_and_time() -> None:
    limits = Limits(body_seconds=0.05, chunks=3)
    assert run(read_body(receiver(part(b"ab"), part(b""), part(b"c", more=False)), 3, limits)) == b"abc"
    for messages, status in (
        ((part(b"abcd", more=False),), 413),
        ((part(b"ab"), part(b"cd")), 413),
        ((part(b""),) * 5, 413),
        ((part(b"a"),), 408),
    ):
        with pytest.raises(RequestError) as caught:
            run(read_body(receiver(*messages), 3, limits))
        assert caught.value.status == status
    with pytest.raises(ClientDisconnectedError):
        run(read_body(receiver(part(b"a"), {"type": "http.disconnect"}), 3, limits))


def test_work_is_cancelled_when_the_client_disconnects() -> None:
    ended = []

    async def work() -> int:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(True)
        return 1

    with pytest.raises(ClientDisconnectedError):
        run(cancel_on_disconnect(receiver({"type": "http.disconnect"}), work()))
    assert ended == [True]

    async def quick() -> int:
        return 7

    assert run(cancel_on_disconnect(receiver(), quick())) == 7

    async def from_outside() -> None:
        async def slow() -> None:
            await asyncio.sleep(30)

        task = asyncio.create_task(cancel_on_disconnect(receiver(), slow()))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # A deadline around it still raises TimeoutError.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await cancel_on_disconnect(receiver(), slow())

    run(from_outside())


def test_decompression_stops_at_the_limit() -> None:
    packed = zlib.compress(bytes(1000))
    assert decompress(packed, "deflate", 1000) == bytes(1000)
    with pytest.raises(RequestError, match=r"The body decompresses to more than 999 bytes\."):
        decompress(packed, "deflate", 999)


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 200_000, 3_000_000])
@pytest.mark.parametrize("random", [False, True])
def test_decompression_in_parts_gives_all_bytes_and_charges_each_once(size: int, random: bool) -> None:
    data = os.urandom(size) if random else bytes(size)
    charged: list[int] = []
    assert decompress(zlib.compress(data), "deflate", size, charged.append) == data
    assert sum(charged) == size
    assert max(charged, default=0) <= 65_536
    for wrong in (zlib.compress(data) + b"x", zlib.compress(data)[:-1], zlib.compress(data) + bytes(70_000)):
        with pytest.raises(RequestError, match="is not exactly one complete deflate stream"):
            decompress(wrong, "deflate", size)


def test_a_body_is_refused_as_soon_as_its_bytes_cannot_be_charged() -> None:
    def refuse(size: int) -> None:
        if size > 2:
            raise RequestError("full", status=429)

    messages = receiver(part(b"ab"), part(b"abc"), part(b"never read", more=False))
    with pytest.raises(RequestError, match="full"):
        run(read_body(messages, 100, Limits(), refuse))
    with pytest.raises(RequestError, match="full"):
        decompress(zlib.compress(bytes(1000)), "deflate", 1000, refuse)
