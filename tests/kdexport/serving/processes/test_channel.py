"""Questions and answers between two processes, here two ends in one."""

import asyncio
import socket
from typing import Any

import pytest

from kdexport.errors import BundleError, ForwardedError
from kdexport.serving.processes.channel import Channel, ChannelClosedError


async def answer(question: str, argument: Any) -> Any:
    if question == "wait":
        await asyncio.sleep(argument)
        return argument
    if question == "fail":
        raise BundleError("Broken.", remedy="Mend it.")
    if question == "break":
        raise ZeroDivisionError(argument)
    return [question, argument]


async def pair() -> tuple[Channel, Channel]:
    one, other = socket.socketpair()
    return await Channel.open(one, answer), await Channel.open(other, answer)


def test_answers_arrive_by_number_on_both_sides_and_errors_keep_their_code() -> None:
    async def test() -> None:
        one, other = await pair()
        large = "\u00e9\n" * 200_000
        asked = (one.ask("wait", 0.1), one.ask("wait", 0.01), other.ask("x", large), one.ask("y"))
        found = list(await asyncio.gather(*asked))
        assert found == [0.1, 0.01, ["x", large], ["y", None]]
        with pytest.raises(ForwardedError, match=r"Broken\.") as error:
            await one.ask("fail")
        assert (error.value.code, error.value.exit_code, error.value.remedy) == ("KDX203", 2, "Mend it.")
        with pytest.raises(ForwardedError) as unexpected:
            await other.ask("break", 1)
        assert unexpected.value.code == "KDX900"
        await one.finish()
        await asyncio.wait_for(other.closed, 5)

    asyncio.run(test())


def test_every_question_to_a_closed_side_fails() -> None:
    async def test() -> None:
        one, other = await pair()
        waiting = [asyncio.create_task(one.ask("wait", 30)) for _ in range(3)]
        await asyncio.sleep(0.05)
        other._writer.transport.abort()
        for task in waiting:
            with pytest.raises(ChannelClosedError):
                await asyncio.wait_for(task, 5)
        with pytest.raises(ChannelClosedError):
            await one.ask("y")

    asyncio.run(test())


def test_what_is_being_answered_is_sent_before_a_side_closes() -> None:
    async def test() -> None:
        one, other = await pair()
        asked = asyncio.create_task(one.ask("wait", 0.1))
        await asyncio.sleep(0.02)
        await other.finish()
        assert await asked == 0.1

    asyncio.run(test())
