"""``kdexport serve``: serve verified bundles over HTTP."""

import importlib.util
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdexport.commands.options import Debug, Plugins
from kdexport.core.console import print_answer
from kdexport.core.extras import install
from kdexport.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    import ssl

    from kdexport.serving.announcement import Announcement
    from kdexport.serving.listening import Address, Ports
    from kdexport.serving.server import Surroundings
    from kdexport.serving.service import Service

_EXTRA = ("starlette", "uvicorn", "httptools", "prometheus_client", "python_multipart")


def require_extra() -> None:
    """Raise ``BackendUnavailableError`` if a package of the server is not installed."""
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"The server needs packages that are not installed: {', '.join(missing)}.",
            remedy=install(missing[0]),
        )


def serve(
    bundles: Annotated[
        list[str], typer.Argument(help="FOLDER or NAME=FOLDER: a bundle, or bundles in folders named 1, 2, 3.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 means any free one.")] = 8000,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of /metrics; 0 means any free one.")] = 8002,
    metrics_host: Annotated[
        str, typer.Option(help="Address of /metrics, which everyone who can connect to it may read.")
    ] = "127.0.0.1",
    target: Annotated[str, typer.Option(help="Target of the bundles to run: onnx-fp32, onnx-int8 or onnx-fp16.")] = (
        "onnx-fp32"
    ),
    provider: Annotated[str, typer.Option(help="Execution provider: cpu, cuda or tensorrt.")] = "cpu",
    engine_cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps the engines of --provider tensorrt for the next start.")
    ] = None,
    instances: Annotated[
        int,
        typer.Option(
            min=0,
            max=256,
            help="Parallel runs of the model, each in its own process on a CPU; 0: one per processor, in one process.",
        ),
    ] = 0,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait in the queue.")] = 32,
    connections: Annotated[int, typer.Option(min=8, help="Most open connections.")] = 512,
    max_body: Annotated[int, typer.Option(min=1024, help="Most bytes of one body, compressed and decompressed.")] = 16
    * 2**20,
    max_bodies: Annotated[int, typer.Option(min=1024, help="Most bytes of all bodies together.")] = 128 * 2**20,
    max_pixels: Annotated[int, typer.Option(min=1024, help="Most pixels of an image.")] = 25_000_000,
    min_side: Annotated[int, typer.Option(min=1, help="Fewest pixels of an image's short side.")] = 16,
    queue_timeout: Annotated[float, typer.Option(min=0.001, help="Most seconds in the queue.")] = 2.0,
    timeout: Annotated[float, typer.Option(min=0.001, help="Most seconds from body to response.")] = 10.0,
    header_timeout: Annotated[float, typer.Option(min=0.05, help="Most seconds for a request header to arrive.")] = 5.0,
    body_timeout: Annotated[float, typer.Option(min=0.05, help="Most seconds for a body to arrive.")] = 10.0,
    keep_alive: Annotated[
        float, typer.Option(min=0.05, help="Seconds after which an idle connection is closed; longer than the proxy's.")
    ] = 75.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds to keep serving after SIGTERM.")] = 5.0,
    grace: Annotated[float, typer.Option(min=0, help="Most seconds to finish open requests after that.")] = 20.0,
    watch: Annotated[
        float, typer.Option(min=0, help="Seconds between checks for new bundles; 0 means only on SIGHUP.")
    ] = 5.0,
    token_file: Annotated[Path | None, typer.Option(help="File with the bearer token that requests must have.")] = None,
    trusted: Annotated[
        Path | None,
        typer.Option(
            "--require-signature",
            metavar="PEM",
            help="Public key or root certificate; serve only bundles whose signature it verifies.",
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key, PEM.")] = None,
    access_log: Annotated[
        str | None, typer.Option(metavar="FILE", help="Append one line of JSON for each request; - means stdout.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Origin whose pages may call the server; repeatable.")
    ] = None,
    otel: Annotated[
        bool, typer.Option("--otel", help="Send a trace of each request, as OTEL_* variables say; extra otel.")
    ] = False,
    plugin: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout when ready.")] = False,
    debug: Debug = False,
) -> None:
    """Serve verified bundles: Open Inference Protocol v2, images on /v1/classify, metrics."""
    require_extra()
    import asyncio

    from kdexport.serving.access_log import require_separate
    from kdexport.serving.cross_origin import require_origins
    from kdexport.serving.limits import Limits
    from kdexport.serving.listening import Address, authority
    from kdexport.serving.own_process import loop_factory, resident_bytes, set_up
    from kdexport.serving.processes.process_plan import Plan, processes_for
    from kdexport.serving.processes.supervisor import Supervisor
    from kdexport.serving.repository import parse_sources
    from kdexport.serving.server import Surroundings
    from kdexport.serving.service import Service, Settings, read_token
    from kdexport.serving.tls import load_certificate, tls_context
    from kdexport.serving.tracing import require_tracing
    from kdexport.targets import require_servable

    limits = Limits(
        queue=queue, connections=connections, body=max_body, bodies=max(max_bodies, max_body), pixels=max_pixels,
        min_side=min_side, queue_seconds=queue_timeout, total_seconds=timeout, header_seconds=header_timeout,
        body_seconds=body_timeout, keep_alive_seconds=keep_alive, drain_seconds=drain, grace_seconds=grace,
    )  # fmt: skip
    token = read_token(token_file)
    settings = Settings(
        provider=_provider(provider),
        target=target,
        instances=instances,
        processes=processes_for(instances, _provider(provider)),
        limits=limits,
        token=token,
        token_file=token_file,
        trusted=trusted,
        engines=_engine_cache(engine_cache, provider),
    )
    require_servable(target, settings.provider)
    require_separate(access_log, as_json=as_json)
    require_origins(cors or ())
    if otel:
        require_tracing()
    surroundings = Surroundings(access_log=access_log, origins=tuple(cors or ()), tracing=otel)
    context = tls_context(tls_cert, tls_key)
    address = Address(host=host, port=port, metrics_host=metrics_host, metrics_port=metrics_port)
    set_up()
    _warn(address, has_token=settings.token is not None)
    _say_processes(instances, settings.processes)

    def announce(ports: "Ports", told: "Announcement") -> None:
        scheme = "http" if context is None else "https"
        url = f"{scheme}://{authority(address.host, ports.port)}"
        metrics_url = f"http://{authority(address.metrics_host, ports.metrics_port)}/metrics"
        _announce(told, url, metrics_url, as_json=as_json)

    def renew() -> None:
        if context is not None and tls_cert is not None and tls_key is not None:
            load_certificate(context, tls_cert, tls_key)

    if settings.processes > 1:
        plan = Plan(
            bundles=tuple(bundles), settings=settings, surroundings=surroundings, tls_cert=tls_cert, tls_key=tls_key,
            supervisor_bytes=resident_bytes(),
        )  # fmt: skip
        serving = Supervisor(plan, address, watch_seconds=watch).run(context=context, started=announce)
    else:
        serving = _one_process(
            Service(parse_sources(bundles), settings), address, surroundings, watch, context, renew, announce
        )
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        cut = runner.run(serving)
    sys.stderr.write(f"stopped; {cut} requests got no response\n")


def _one_process(
    service: "Service",
    address: "Address",
    surroundings: "Surroundings",
    watch_seconds: float,
    context: "ssl.SSLContext | None",
    renew: Callable[[], None],
    announce: "Callable[[Ports, Announcement], None]",
) -> Coroutine[Any, Any, int]:
    """Load the models in this process; returns what serves them."""
    from kdexport.serving.announcement import announcement
    from kdexport.serving.descriptors import require_descriptors
    from kdexport.serving.own_process import resident_bytes
    from kdexport.serving.server import Server

    require_descriptors(service.limits.connections)
    server = Server(service, address, watch_seconds=watch_seconds, surroundings=surroundings)
    service.load()
    told = announcement(service, service.require_memory(resident_bytes()))
    return server.run(context=context, started=lambda ports: announce(ports, told), renew=renew)


def _say_processes(instances: int, processes: int) -> None:
    """Say how many processes run the instances that were asked for, if it is not one each."""
    if 1 < processes < instances:
        sys.stderr.write(f"{instances} instances in {processes} processes: as many as there are usable processors.\n")
    elif 1 == processes < instances:
        sys.stderr.write(f"{instances} instances as threads of one process.\n")


def _announce(told: "Announcement", url: str, metrics_url: str, *, as_json: bool) -> None:
    """Print the models, their limits and where they are served."""
    instances = f"{told.instances} instances"
    if told.processes > 1:
        instances += f" in {told.processes} processes"
    for model in told.models:
        signed = "" if model.signer is None else f", signed by {model.signer}"
        sys.stderr.write(
            f"{model.name} version {model.version}{signed}, {model.target} on {model.provider}, {instances}; "
            f"largest difference to the reference on {model.images} golden images: {model.error:.1e} "
            f"(up to {model.allowed:.1e} allowed)\n"
        )
    sys.stderr.write(f"decoder of small JPEGs: {told.decoder}\n")
    sys.stderr.write(f"memory: {told.memory}\nserving {url}, metrics {metrics_url}\n")
    if as_json:
        print_answer(
            {
                "url": url, "metrics_url": metrics_url, "instances": told.instances, "processes": told.processes,
                "memory_bound_bytes": told.memory_bytes, "models": [model.to_json() for model in told.models],
            }
        )  # fmt: skip


def _warn(address: "Address", *, has_token: bool) -> None:
    """Say what other machines can reach without a token."""
    from kdexport.serving.listening import is_loopback

    if not is_loopback(address.host) and not has_token:
        sys.stderr.write(
            f"warning: other machines can reach {address.host}, and no token is required; pass --token-file FILE.\n"
        )
    if not is_loopback(address.metrics_host):
        sys.stderr.write(
            f"warning: other machines can read the metrics on {address.metrics_host}; they never require a token.\n"
        )


def _engine_cache(folder: Path | None, provider: str) -> Path | None:
    if folder is not None and provider != "tensorrt":
        raise ConfigError(
            f"--engine-cache keeps engines of TensorRT, but --provider is {provider}.",
            remedy="Omit --engine-cache, or pass --provider tensorrt.",
        )
    return folder


def _provider(name: str) -> str:
    from kdexport.backends.ort import CPU, CUDA, TENSORRT

    providers = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
    if name not in providers:
        raise ConfigError(f"--provider {name!r} is not known.", remedy=f"Known providers: {', '.join(providers)}.")
    return providers[name]
