"""A process that answers its supervisor as a file says, without models: started in milliseconds, ended at will.

The file is ``script.json`` in the folder of the only bundle. It maps the number of a process to what differs from
``_USUAL``.
"""

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from kdexport.errors import BundleError
from kdexport.serving.processes.channel import Channel

_USUAL: dict[str, Any] = {
    "models": {"zoo version 1": "a"}, "prepared": None, "fails": False, "dies_at": "", "metrics": "", "cut": 0,
    "sleeps_at": "", "statistics": [],
}  # fmt: skip
_ANNOUNCED = {
    "models": [], "instances": 2, "processes": 2, "decoder": "none", "memory": "none", "memory_bytes": 1,
}  # fmt: skip


def _script(folder: Path, number: str) -> dict[str, Any]:
    return {**_USUAL, **json.loads((folder / "script.json").read_text()).get(number, {})}


async def _run(folder: Path, number: str, channel: socket.socket, requests: socket.socket) -> None:
    ended = asyncio.Event()

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = f'{{"id": "identity-{number}"}}'
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    async def answer(question: str, _: Any) -> Any:
        script = _script(folder, number)
        with (folder / "asked").open("a") as stream:
            stream.write(f"{number} {question}\n")
        if question == script["dies_at"]:
            os._exit(7)
        if question == script["sleeps_at"]:
            await asyncio.sleep(60)
        if question == "describe":
            if script["fails"]:
                raise BundleError("The bundle is broken.", remedy="Mend it.")
            return {"identity": f"identity-{number}", "announcement": _ANNOUNCED, "models": script["models"]}
        if question == "serve":
            await asyncio.start_server(respond, sock=requests)
        if question == "prepare":
            return {"errors": [], "models": script["prepared"] or script["models"]}
        if question == "drain":
            ended.set()
            return script["cut"]
        return script.get(question)

    asking = await Channel.open(channel, answer)
    await asyncio.wait({asking.closed, asyncio.create_task(ended.wait())}, return_when=asyncio.FIRST_COMPLETED)
    await asking.finish()


if __name__ == "__main__":
    folder = Path(json.loads(sys.argv[1])["bundles"][0].partition("=")[2])
    sockets = (socket.socket(fileno=int(number)) for number in sys.argv[3:5])
    asyncio.run(_run(folder, sys.argv[2], *sockets))
