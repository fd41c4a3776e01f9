"""``kdexport serve``: serve verified bundles over HTTP."""

import importlib.util
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdexport.commands.options import Debug, Plugins
from kdexport.core.console import print_answer
from kdexport.core.extras import install
from kdexport.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    import ssl

    from kdexport.serving.listening import Address
    from kdexport.serving.server import Running, Surroundings
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
    instances: Annotated[
        int, typer.Option(min=0, max=256, help="Parallel runs of the model; 0 means one per processor.")
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
    from kdexport.serving.access_log import require_separate
    from kdexport.serving.cross_origin import require_origins
    from kdexport.serving.limits import Limits
    from kdexport.serving.listening import Address
    from kdexport.serving.repository import parse_sources
    from kdexport.serving.server import Surroundings
    from kdexport.serving.service import Service, Settings, read_token
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
        limits=limits,
        token=token,
        token_file=token_file,
        trusted=trusted,
    )
    require_servable(target, settings.provider)
    require_separate(access_log, as_json=as_json)
    require_origins(cors or ())
    if otel:
        require_tracing()
    surroundings = Surroundings(access_log=access_log, origins=tuple(cors or ()), tracing=otel)
    context = _tls(tls_cert, tls_key)
    service = Service(parse_sources(bundles), settings)
    address = Address(host=host, port=port, metrics_host=metrics_host, metrics_port=metrics_port)

    def renew() -> None:
        if context is not None and tls_cert is not None and tls_key is not None:
            _load_certificate(context, tls_cert, tls_key)

    run(
        service, address, surroundings=surroundings, watch_seconds=watch, context=context, renew=renew, as_json=as_json
    )  # fmt: skip


def run(
    service: "Service",
    address: "Address",
    *,
    surroundings: "Surroundings",
    watch_seconds: float,
    context: "ssl.SSLContext | None",
    renew: Callable[[], None],
    as_json: bool,
) -> None:
    """Load the models, print where they are served, serve until a signal, and drain."""
    import asyncio

    from kdexport.serving.descriptors import require_descriptors
    from kdexport.serving.listening import authority
    from kdexport.serving.plain_jpeg import decoder_name
    from kdexport.serving.server import Server

    # SIGHUP asks for a reload; before the server handles it, it must not end the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    require_descriptors(service.limits.connections)
    server = Server(service, address, watch_seconds=watch_seconds, surroundings=surroundings)
    service.load()
    bound = service.require_memory(resident_bytes())
    _warn(address, has_token=service.settings.token is not None)

    def announce(running: "Running") -> None:
        scheme = "http" if context is None else "https"
        url = f"{scheme}://{authority(address.host, running.port)}"
        metrics_url = f"http://{authority(address.metrics_host, running.metrics_port)}/metrics"
        for model in service.repository.models.values():
            golden = model.golden
            signed = "" if model.signer is None else f", signed by {model.signer}"
            sys.stderr.write(
                f"{model.name} version {model.version}{signed}, {model.target} on {model.provider}, {service.count} "
                "instances; "
                f"largest difference to the reference on {golden.images} golden images: {golden.error:.1e} "
                f"(up to {golden.allowed:.1e} allowed)\n"
            )
        sys.stderr.write(f"decoder of small JPEGs: {decoder_name()}\n")
        sys.stderr.write(f"memory: {bound.describe()}\nserving {url}, metrics {metrics_url}\n")
        if as_json:
            print_answer(_describe(service, url, metrics_url, bound.total))

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        cut = runner.run(server.run(context=context, started=announce, renew=renew))
    sys.stderr.write(f"stopped; {cut} requests got no response\n")


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


def _describe(service: "Service", url: str, metrics_url: str, bound: int) -> dict[str, Any]:
    models = service.repository.models.values()
    return {
        "url": url,
        "metrics_url": metrics_url,
        "instances": service.count,
        "memory_bound_bytes": bound,
        "models": [
            {
                "name": m.name,
                "version": str(m.version),
                "target": m.target,
                "provider": m.provider,
                **({} if m.signer is None else {"signed_by": m.signer.to_json()}),
            }
            for m in models
        ],
    }


def resident_bytes() -> int:
    """The largest resident size of this process so far, in bytes."""
    import resource

    # macOS counts bytes, Linux KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _loop_factory() -> Any:
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


def _provider(name: str) -> str:
    from kdexport.backends.ort import CPU, CUDA, TENSORRT

    providers = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
    if name not in providers:
        raise ConfigError(f"--provider {name!r} is not known.", remedy=f"Known providers: {', '.join(providers)}.")
    return providers[name]


def _tls(cert: Path | None, key: Path | None) -> "ssl.SSLContext | None":
    import ssl

    if cert is None and key is None:
        return None
    if cert is None or key is None:
        given, missing = ("--tls-cert", "--tls-key") if key is None else ("--tls-key", "--tls-cert")
        raise ConfigError(f"{given} was given without {missing}; TLS needs both.", remedy=f"Add {missing} FILE.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_certificate(context, cert, key)
    return context


def _load_certificate(context: "ssl.SSLContext", cert: Path, key: Path) -> None:
    """Use this certificate from the next handshake on; raises ``ConfigError``, and then the old one stays."""
    import ssl

    try:
        # A key of another certificate is noticed only after the context has taken the certificate.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
        context.load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{cert} and {key} are not a certificate and its private key: {error}.",
            remedy="Pass the PEM file of the certificate chain as --tls-cert and that of its key as --tls-key.",
        ) from error
