"""The state that requests share: models, instances, decoding threads, admission and statistics."""

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from kdexport.backends.ort import CPU
from kdexport.errors import RequestError, ServerError
from kdexport.serving.batching import Instances
from kdexport.serving.images import PixelBudget
from kdexport.serving.limits import MIB, Limits, MemoryBound, memory_bound, memory_limit, usable_processors
from kdexport.serving.loading import LoadedModel
from kdexport.serving.metrics import Metrics, ModelStatistics
from kdexport.serving.repository import Change, Repository, Source
from kdexport.targets import DEFAULT_TARGET

_log = logging.getLogger("kdexport.serving")
_MIN_TOKEN_CHARACTERS = 16

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Admission:
    """Admits requests up to a number and a sum of body sizes, before a byte of their bodies is read.

    It is used only on the event loop and therefore needs no lock.
    """

    def __init__(self, *, places: int, bodies: int) -> None:
        self.places = places
        self.bodies = bodies
        self.in_progress = 0
        self.reserved = 0

    @contextmanager
    def enter(self, size: int) -> Iterator[None]:
        """Reserve a place and ``size`` bytes for the block; raises ``RequestError`` with status 429 at the limit."""
        if self.in_progress >= self.places:
            raise RequestError(
                f"The server is at capacity: {self.in_progress} requests in progress (limit {self.places}).",
                remedy="Retry later.",
                status=429,
                reason="busy",
            )
        if self.reserved + size > self.bodies and self.in_progress:
            raise RequestError(
                f"The server is at capacity: the bodies of requests in progress have up to {self.reserved:,} bytes, "
                f"and this one up to {size:,} (limit {self.bodies:,} together).",
                remedy="Retry later.",
                status=429,
                reason="busy",
            )
        self.in_progress += 1
        self.reserved += size
        try:
            yield
        finally:
            self.in_progress -= 1
            self.reserved -= size


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a service runs; ``instances`` 0 means one per usable processor, or one on a GPU."""

    provider: str = CPU
    target: str = DEFAULT_TARGET
    instances: int = 0
    limits: Limits = field(default_factory=Limits)
    token: str | None = field(default=None, repr=False)
    #: A public key or certificates in PEM: only bundles are served whose signature it verifies.
    trusted: Path | None = None


class Service:
    """The models of a server and all that runs them; call ``load`` before the first request, ``close`` at the end."""

    def __init__(self, sources: tuple[Source, ...], settings: Settings) -> None:
        self.settings = settings
        self.limits = settings.limits
        #: Differs between any two processes; health probes and metrics carry it.
        self.identity = secrets.token_hex(8)
        self.metrics = Metrics(self.identity)
        self.repository = Repository(
            sources, provider=settings.provider, limits=settings.limits, target=settings.target,
            trusted=settings.trusted,
        )  # fmt: skip
        self.budget = PixelBudget(settings.limits.pixels)
        self.decoders = usable_processors()
        self.count = settings.instances or (self.decoders if settings.provider == CPU else 1)
        self.draining = False
        self.together = 1
        self.admission = Admission(places=0, bodies=settings.limits.bodies)
        self._instances: Instances | None = None
        self._pool = ThreadPoolExecutor(self.decoders, thread_name_prefix="decode")
        self._statistics: dict[tuple[str, int, str], ModelStatistics] = {}
        self._authorization = f"Bearer {settings.token}".encode() if settings.token else None

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
        self.repository.load_all()
        self.together = max(model.pace.together for model in self.repository.models.values())
        self.admission.places = self.limits.places(self.count, self.together)
        self._instances = Instances(self.count, capacity=self.admission.places)
        self.metrics.reloads.labels("loaded").inc(len(self.repository.models))

    def reload(self) -> Change:
        """Load the bundles that changed on disk; a refused bundle leaves its old model in place. Blocking."""
        change = self.repository.reload()
        for name, version in change.loaded:
            _log.warning("%s version %d is now served from its new bundle.", name, version)
        for name, version in change.removed:
            _log.warning("%s version %d is no longer served: its folder was removed.", name, version)
        for (name, version), error in change.refused.items():
            _log.error("%s version %d: the new bundle is refused: %s %s", name, version, error.message, error.remedy)
        self.metrics.reloads.labels("loaded").inc(len(change.loaded))
        self.metrics.reloads.labels("refused").inc(len(change.refused))
        return change

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

    def authorise(self, headers: Mapping[str, str]) -> None:
        """Raise ``RequestError`` with status 401 if the server has a token and the request does not."""
        if self._authorization is None:
            return
        given = headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self._authorization):
            raise RequestError(
                "The request has no valid bearer token.",
                remedy="Send the header Authorization: Bearer TOKEN.",
                status=401,
                reason="unauthorised",
            )

    def bound(self, base: int) -> MemoryBound:
        """The most memory of this process, given that it takes ``base`` bytes after loading."""
        signatures = [model.signature for model in self.repository.models.values()]
        return memory_bound(
            self.limits,
            base=base,
            instances=self.count,
            together=self.together,
            decoders=self.decoders,
            image_bytes=max(signature.image_bytes for signature in signatures),
            max_elements=max(signature.max_batch * signature.elements for signature in signatures),
        )

    def require_memory(self, base: int) -> MemoryBound:
        """The memory bound; raises ``ServerError`` if the control group allows less."""
        bound, allowed = self.bound(base), memory_limit()
        if allowed is not None and bound.total > allowed:
            raise ServerError(
                f"With these limits the server takes {bound.describe()}, but its control group allows "
                f"{allowed / MIB:.0f} MiB.",
                remedy="Lower --max-bodies, --max-pixels or --connections, or give the container more memory.",
            )
        return bound


def read_token(path: Path | None) -> str | None:
    """The bearer token in a file; raises ``ServerError`` if it cannot be read or is too weak."""
    if path is None:
        return None
    try:
        token = path.read_bytes().strip().decode("ascii")
    except OSError as error:
        raise ServerError(
            f"The token file {path} cannot be read: {error.strerror}.", remedy="Check the path and its permissions."
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
