"""One process of a server of several: it loads the models and answers requests, and the supervisor tells it when."""

import asyncio
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kdexport.core.console import storage_error
from kdexport.core.extras import missing_package
from kdexport.errors import ForwardedError, KdexportError, RequestError, UnexpectedError
from kdexport.serving.announcement import announcement
from kdexport.serving.descriptors import require_descriptors
from kdexport.serving.loading import LoadedModel
from kdexport.serving.own_process import loop_factory, resident_bytes, set_up
from kdexport.serving.processes.channel import Channel, ChannelClosedError
from kdexport.serving.processes.process_plan import Plan
from kdexport.serving.repository import Key, Prepared, parse_sources
from kdexport.serving.server import Front
from kdexport.serving.service import Service
from kdexport.serving.tls import load_certificate, tls_context


class Worker:
    """A service with the socket of its process; constructing it loads the models. Raises ``KdexportError``."""

    def __init__(self, plan: Plan, requests: socket.socket) -> None:
        self._plan = plan
        self._context = tls_context(plan.tls_cert, plan.tls_key)
        self._service = Service(parse_sources(plan.bundles), plan.settings)
        require_descriptors(self._service.limits.connections)
        self._front = Front(self._service, requests, surroundings=plan.surroundings)
        self._service.load()
        base = resident_bytes() + plan.supervisor_bytes // plan.settings.processes
        self._announcement = announcement(self._service, self._service.require_memory(base))
        self._prepared: Prepared | None = None
        self._stopping = asyncio.Event()
        self._cut: asyncio.Future[int]

    def describe(self) -> dict[str, Any]:
        """The identity of this process, the digests of its models, and what it would announce if it was alone."""
        models = self._service.repository.models
        return {
            "identity": self._service.identity, "models": _digests(models),
            "announcement": self._announcement.to_json(),
        }  # fmt: skip

    async def run(self, channel: Channel) -> None:
        """Answer requests when the supervisor wants it, until it or SIGTERM ends this process."""
        self._cut = asyncio.get_running_loop().create_future()
        self._service.ask_all = lambda: _ask_all(channel)
        loop = asyncio.get_running_loop()
        # A system that stops a server may signal every process of it; what the supervisor asks then changes nothing.
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({stopping, channel.closed}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            # Without a supervisor nobody would stop it; its end is near on Linux anyway.
            stopping.cancel()
            return
        self._cut.set_result(await self._front.drain())
        await self._front.close()

    async def answer(self, question: str, argument: Any) -> Any:
        """Answer a question of the supervisor."""
        del argument
        if question == "serve":
            return await self._front.open(self._context)
        if question == "prepare":
            return await asyncio.to_thread(self._prepare)
        if question == "adopt":
            prepared, self._prepared = self._prepared, None
            return None if prepared is None else self._adopt(prepared)
        if question == "discard":
            self._prepared = None
            return None
        if question == "metrics":
            return self._service.metrics.text().decode()
        if question == "statistics":
            models = sorted(self._service.repository.models.items())
            return [self._service.statistics(model).to_json() for _, model in models]
        if question == "drain":
            self._stopping.set()
            return await self._cut
        raise ValueError(question)

    def _prepare(self) -> dict[str, Any]:
        """Read certificate and token again, and load new bundles; answers with what is wrong and what is new."""
        errors = []
        for step in (self._renew_certificate, self._service.renew_token):
            try:
                step()
            except (KdexportError, OSError) as error:
                errors.append(str(error))
        prepared = self._service.repository.prepare()
        self._prepared = prepared
        return {"errors": errors, "models": _digests(prepared.models)}

    def _renew_certificate(self) -> None:
        if self._context is not None and self._plan.tls_cert is not None and self._plan.tls_key is not None:
            load_certificate(self._context, self._plan.tls_cert, self._plan.tls_key)

    def _adopt(self, prepared: Prepared) -> None:
        self._service.adopt(prepared)


def _digests(models: Mapping[Key, LoadedModel]) -> dict[str, str]:
    return {f"{name} version {version}": model.digest for (name, version), model in models.items()}


async def _ask_all(channel: Channel) -> Sequence[Sequence[Mapping[str, Any]]]:
    try:
        answer: Sequence[Sequence[Mapping[str, Any]]] = await channel.ask("statistics")
    except (ForwardedError, ChannelClosedError) as error:
        raise RequestError(
            "Another process of the server did not tell its statistics in time.",
            remedy="Retry later.",
            status=503,
            reason="statistics",
        ) from error
    return answer


def _load(plan: str, requests: socket.socket) -> Worker | KdexportError:
    """The loaded worker, or the error of the start as the command would show it."""
    try:
        return Worker(Plan.from_text(plan), requests)
    except KdexportError as error:
        return error
    except OSError as error:
        return storage_error(error)
    except Exception as error:  # noqa: BLE001, the supervisor shows it
        return missing_package(error) or UnexpectedError(error)


async def _serve(worker: Worker | KdexportError, sock: socket.socket) -> None:
    async def answer(question: str, argument: Any) -> Any:
        if isinstance(worker, KdexportError):
            raise worker
        if question == "describe":
            return worker.describe()
        return await worker.answer(question, argument)

    channel = await Channel.open(sock, answer)
    if isinstance(worker, KdexportError):
        # The supervisor asks, gets the error, and closes.
        await asyncio.wait({channel.closed})
    else:
        await worker.run(channel)
    await channel.finish()


def _main() -> None:
    plan, number, channel, requests = sys.argv[1], *map(int, sys.argv[2:5])
    set_up(f"process {number}: ")
    worker = _load(plan, socket.socket(fileno=requests))
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(worker, socket.socket(fileno=channel)))


if __name__ == "__main__":
    _main()
