"""Questions and answers between the supervisor and one of its processes: lines of JSON on a pair of sockets."""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from kdexport.errors import ForwardedError, KdexportError, UnexpectedError

_log = logging.getLogger("kdexport.serving")
#: The longest line: metrics of many models.
_MAX_LINE = 64 * 2**20

#: Answers a question: its name and argument to a value of JSON; may raise ``KdexportError``.
Answerer = Callable[[str, Any], Awaitable[Any]]


class ChannelClosedError(Exception):
    """The other process has ended, or closed its side."""


class Channel:
    """One side. Both may ask at any time; questions are answered beside each other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answerer) -> None:
        self._reader = reader
        self._writer = writer
        self._answer = answer
        self._asked = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        #: Done when the other side has closed.
        self.closed = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, sock: socket.socket, answer: Answerer) -> "Channel":
        """The channel over a connected socket, which it owns from now on."""
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=_MAX_LINE)
        return cls(reader, writer, answer)

    async def ask(self, question: str, argument: Any = None) -> Any:
        """The answer of the other side; raises its error as ``ForwardedError``, or ``ChannelClosedError``."""
        if self.closed.done():
            raise ChannelClosedError
        self._asked += 1
        number = self._asked
        self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._send({"ask": question, "argument": argument, "number": number})
            return await self._waiting[number]
        finally:
            self._waiting.pop(number, None)

    async def finish(self) -> None:
        """Send what is being answered, and close this side."""
        await asyncio.gather(*self._answering, return_exceptions=True)
        with contextlib.suppress(OSError):
            await self._writer.drain()
            self._writer.close()
            await self._writer.wait_closed()

    def _send(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                self._take(json.loads(line))
        except OSError:
            # The other process was killed.
            pass
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ChannelClosedError())
            self._writer.close()

    def _take(self, message: dict[str, Any]) -> None:
        if "ask" in message:
            task = asyncio.create_task(self._reply(message))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
            return
        future = self._waiting.get(message["number"])
        if future is None or future.done():
            return
        if "error" in message:
            error = message["error"]
            future.set_exception(
                ForwardedError(
                    error["message"], remedy=error["remedy"], code=error["code"], exit_code=error["exit_code"]
                )
            )
        else:
            future.set_result(message["answer"])

    async def _reply(self, message: dict[str, Any]) -> None:
        number = message["number"]
        try:
            self._send({"number": number, "answer": await self._answer(message["ask"], message["argument"])})
        except ChannelClosedError:
            self._send({"number": number, "error": _described(UnexpectedError(ChannelClosedError()))})
        except KdexportError as error:
            self._send({"number": number, "error": _described(error)})
        except Exception as error:  # noqa: BLE001, it is logged, and the other side gets it too
            _log.exception("A question of another process of the server failed.")
            self._send({"number": number, "error": _described(UnexpectedError(error))})


def _described(error: KdexportError) -> dict[str, Any]:
    return {"message": error.message, "remedy": error.remedy, "code": error.code, "exit_code": error.exit_code}
