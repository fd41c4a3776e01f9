"""The state that requests share: models, instances, decoding threads, admission and statistics."""

import asyncio
import hmac
import logging
import math
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from kdexport.backends.ort import CPU
from kdexport.errors import RequestError, ServerError
from kdexport.serving.batching import Instances
from kdexport.serving.images import PixelBudget
from kdexport.serving.limits import MIB, Limits, MemoryBound, memory_bound, memory_limit, usable_processors
from kdexport.serving.loading import LoadedModel
from kdexport.serving.metrics import Metrics, ModelStatistics
from kdexport.serving.repository import Change, Prepared, Repository, Source
from kdexport.serving.sums import summed_statistics
from kdexport.targets import DEFAULT_TARGET

_log = logging.getLogger("kdexport.serving")
_MIN_TOKEN_CHARACTERS = 16
#: Limits below these are not proposed, because common photos and clients would be refused.
_LOWEST_PIXELS = 2_000_000
_LOWEST_CONNECTIONS = 64
_LOWEST_BODY = 2 * MIB

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Reservation:
    """The bytes that one request in progress holds of an ``Admission``."""

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission
        self.size = 0

    def charge(self, size: int) -> None:
        """Reserve ``size`` more bytes, before they are stored; raises ``RequestError`` with status 429 at the limit."""
        self._admission.charge(self, size)


class Admission:
    """Admits requests up to a number, and their bodies up to a sum of bytes.

    A body whose size is declared is charged before a byte of it is read, any other as its bytes arrive. Decompressing
    threads charge too, hence the lock.
    """

    def __init__(self, *, places: int, bodies: int) -> None:
        self.places = places
        self.bodies = bodies
        self.in_progress = 0
        self.reserved = 0
        self._lock = threading.Lock()

    def open(self, size: int = 0) -> Reservation:
        """Reserve a place and ``size`` bytes until ``close``; raises ``RequestError`` with status 429 at the limit."""
        if self.in_progress >= self.places:
            raise RequestError(
                f"The server is at capacity: {self.in_progress} requests in progress (limit {self.places}).",
                remedy="Retry later.",
                status=429,
                reason="busy",
            )
        reservation = Reservation(self)
        reservation.charge(size)
        self.in_progress += 1
        return reservation

    def close(self, reservation: Reservation) -> None:
        """Release what ``open`` reserved and what was charged since."""
        self.in_progress -= 1
        with self._lock:
            self.reserved -= reservation.size

    @contextmanager
    def enter(self, size: int = 0) -> Iterator[Reservation]:
        """``open`` for a block."""
        reservation = self.open(size)
        try:
            yield reservation
        finally:
            self.close(reservation)

    def charge(self, reservation: Reservation, size: int) -> None:
        """See ``Reservation.charge``; a request that is alone is never refused."""
        with self._lock:
            if size and self.reserved + size > self.bodies and self.reserved > reservation.size:
                others, own = self.reserved - reservation.size, reservation.size + size
                raise RequestError(
                    f"The server is at capacity: the bodies of requests in progress have up to {others:,} bytes, and "
                    f"this one up to {own:,} (limit {self.bodies:,} together).",
                    remedy="Retry later.",
                    status=429,
                    reason="busy",
                )
            self.reserved += size
            reservation.size += size


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a service runs; ``instances`` 0 means one per usable processor, or one on a GPU.

    Instances and limits are those of the server, and ``processes`` share them.
    """

    provider: str = CPU
    target: str = DEFAULT_TARGET
    instances: int = 0
    processes: int = 1
    limits: Limits = field(default_factory=Limits)
    token: str | None = field(default=None, repr=False)
    #: The file of the token, which every reload reads again.
    token_file: Path | None = None
    #: A public key or certificates in PEM: only bundles are served whose signature it verifies.
    trusted: Path | None = None
    #: A folder that keeps the engines of the TensorRT provider; without it each start builds them.
    engines: Path | None = None


class Service:
    """The models of a server and all that runs them; call ``load`` before the first request, ``close`` at the end."""

    def __init__(self, sources: tuple[Source, ...], settings: Settings) -> None:
        self.settings = settings
        #: Those of this process.
        self.limits = settings.limits.share(settings.processes)
        #: Differs between any two processes; health probes and metrics carry it.
        self.identity = secrets.token_hex(8)
        self.metrics = Metrics(self.identity)
        self.repository = Repository(
            sources, provider=settings.provider, limits=self.limits, target=settings.target,
            trusted=settings.trusted, engines=settings.engines,
        )  # fmt: skip
        self.budget = PixelBudget(self.limits.pixels)
        #: Runs of a model at the same time, in the whole server and in this process.
        self.total = settings.instances or (usable_processors() if settings.provider == CPU else 1)
        self.count = math.ceil(self.total / settings.processes)
        self.decoders = max(1, usable_processors() // settings.processes)
        #: Asks all processes of the server for their statistics; None if this is the only one.
        self.ask_all: Callable[[], Awaitable[Sequence[Sequence[Mapping[str, Any]]]]] | None = None
        self.draining = False
        self.together = 1
        self.admission = Admission(places=0, bodies=settings.limits.bodies)
        self._instances: Instances | None = None
        self._pool = ThreadPoolExecutor(self.decoders, thread_name_prefix="decode")
        self._statistics: dict[tuple[str, int, str], ModelStatistics] = {}
        self._authorization: bytes | None = None
        self._require_token(settings.token)

    @property
    def ready(self) -> bool:
        """Whether load balancers should send new requests to this server."""
        return self._instances is not None and not self.draining

    @property
    def instances(self) -> Instances:
        """The running instances; raises ``RequestError`` with status 503 before they have started."""
        if self._instances is None:
            raise RequestError(
                "The server is starting.",
                remedy="Retry when GET /v2/health/ready answers 200.",
                status=503,
                reason="starting",
            )
        return self._instances

    def load(self) -> None:
        """Load every model and run its golden images, which warms it up. Blocking; raises ``KdexportError``."""
        if self._instances is not None:
            return
        change = self.repository.load_all()
        self.together = max(model.pace.together for model in self.repository.models.values())
        # On a CPU a second batch cannot be prepared while the first runs: more requests would only wait longer.
        self.admission.places = self.limits.places(self.count, 1 if self.settings.provider == CPU else self.together)
        self._instances = Instances(self.count, capacity=self.admission.places)
        self._count(change)

    def renew_token(self) -> None:
        """Read the token again; raises ``ServerError`` if it cannot be, and the old one stays valid."""
        if self.settings.token_file is not None:
            self._require_token(read_token(self.settings.token_file))

    def reload(self) -> Change:
        """Load the bundles that changed on disk; a refused bundle leaves its old model in place. Blocking.

        The token is read again first; see ``renew_token``.
        """
        self.renew_token()
        return self.adopt(self.repository.prepare())

    def adopt(self, prepared: Prepared) -> Change:
        """Serve what ``Repository.prepare`` has loaded, and log and count it."""
        change = self.repository.adopt(prepared)
        for name, version in change.loaded:
            _log.warning("%s version %d is now served from its new bundle.", name, version)
        for name, version in change.removed:
            _log.warning("%s version %d is no longer served: its folder was removed.", name, version)
        self._count(change)
        return change

    def _count(self, change: Change) -> None:
        for (name, version), error in change.refused.items():
            _log.error("%s version %d: the new bundle is refused: %s %s", name, version, error.message, error.remedy)
        self.metrics.reloads.labels("loaded").inc(len(change.loaded))
        self.metrics.reloads.labels("refused").inc(len(change.refused))

    def _require_token(self, token: str | None) -> None:
        self._authorization = f"Bearer {token}".encode() if token else None

    def close(self) -> None:
        """Wait for the running work and end all threads."""
        if self._instances is not None:
            self._instances.close()
            self._instances = None
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def off_loop(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Run ``work`` in a decoding thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(*args, **kwargs))

    def statistics(self, model: LoadedModel) -> ModelStatistics:
        """The statistics of a loaded bundle; they start at zero when another bundle takes its version."""
        key = (model.name, model.version, model.digest)
        if key not in self._statistics:
            kept = {(m.name, m.version, m.digest) for m in self.repository.models.values()} | {key}
            self._statistics = {old: value for old, value in self._statistics.items() if old in kept}
            self._statistics[key] = ModelStatistics(self.metrics, model.name, model.version)
        return self._statistics[key]

    async def all_statistics(self) -> Sequence[Mapping[str, Any]]:
        """The statistics of every model, summed over all processes of the server."""
        models = [model for _, model in sorted(self.repository.models.items())]
        if self.ask_all is None:
            return [self.statistics(model).to_json() for model in models]
        return summed_statistics(await self.ask_all())

    def authorise(self, authorization: str) -> None:
        """Raise ``RequestError`` with status 401 if the server has a token and this header does not."""
        if self._authorization is None:
            return
        given = authorization.encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self._authorization):
            raise RequestError(
                "The request has no valid bearer token.",
                remedy="Send the header Authorization: Bearer TOKEN.",
                status=401,
                reason="unauthorised",
            )

    def bound(self, base: int, limits: Limits | None = None) -> MemoryBound:
        """The most memory of the server, given that each of its processes takes ``base`` bytes after loading.

        ``limits`` are those of all processes together.
        """
        limits = (limits or self.settings.limits).share(self.settings.processes)
        signatures = [model.signature for model in self.repository.models.values()]
        return memory_bound(
            limits,
            base=base,
            instances=self.count,
            together=self.together,
            processes=self.settings.processes,
            decoders=self.decoders,
            image_bytes=max(signature.image_bytes for signature in signatures),
            max_elements=max(
                min(signature.max_batch, limits.images_per_body(signature.tensor_bytes)) * signature.elements
                for signature in signatures
            ),
        )

    def require_memory(self, base: int) -> MemoryBound:
        """The memory bound; raises ``ServerError`` if the control group allows less."""
        bound, allowed = self.bound(base), memory_limit()
        if allowed is not None and bound.total > allowed:
            fitting = self._fitting(base, allowed)
            more = f"give the container at least {math.ceil(bound.total / MIB)} MiB"
            if bound.processes > 1:
                more = f"lower --instances, or {more}"
            raise ServerError(
                f"With these limits the server takes {bound.describe()}, but its control group allows "
                f"{allowed / MIB:.0f} MiB. The largest part is {bound.largest}.",
                remedy=f"{more[0].upper()}{more[1:]}." if fitting is None else f"Pass {fitting}, or {more}.",
            )
        return bound

    def _fitting(self, base: int, allowed: int) -> str | None:
        """Options with which the server fits into ``allowed`` bytes, None if lower limits alone do not suffice."""
        limits = self.settings.limits
        while (bound := self.bound(base, limits)).total > allowed:
            sizes = {
                "pixels": bound.decoding, "bodies": 2 * bound.bodies, "connections": bound.connections,
                "body": bound.json,
            }  # fmt: skip
            lowest = {
                "pixels": _LOWEST_PIXELS, "bodies": limits.body, "connections": _LOWEST_CONNECTIONS,
                "body": _LOWEST_BODY,
            }  # fmt: skip
            possible = {key: size for key, size in sizes.items() if getattr(limits, key) // 2 >= lowest[key]}
            if not possible:
                return None
            largest = max(possible, key=lambda key: possible[key])
            limits = replace(limits, **{largest: getattr(limits, largest) // 2})
        options = {
            "pixels": "--max-pixels", "bodies": "--max-bodies", "body": "--max-body", "connections": "--connections",
        }  # fmt: skip
        changed = {
            key: getattr(limits, key) for key in options if getattr(limits, key) != getattr(self.settings.limits, key)
        }
        return " ".join(f"{options[key]} {value}" for key, value in changed.items())


def read_token(path: Path | None) -> str | None:
    """The bearer token in a file; raises ``ServerError`` if it cannot be read or is too weak."""
    if path is None:
        return None
    try:
        token = path.read_bytes().strip().decode("ascii")
    except OSError as error:
        raise ServerError(
            f"The token file {path} cannot be read: {error.strerror}.",
            remedy=(
                f"Write a token to it: openssl rand -hex 32 > {path}"
                if isinstance(error, FileNotFoundError)
                else "Check the path and its permissions."
            ),
        ) from error
    except UnicodeDecodeError:
        raise ServerError(
            f"The token in {path} has characters outside ASCII; only ASCII is allowed.",
            remedy=f"Write another one: openssl rand -hex 32 > {path}",
        ) from None
    if len(token) < _MIN_TOKEN_CHARACTERS:
        raise ServerError(
            f"The token in {path} has {len(token)} characters (at least {_MIN_TOKEN_CHARACTERS} required).",
            remedy=f"Write a longer one: openssl rand -hex 32 > {path}",
        )
    return token
