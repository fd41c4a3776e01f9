"""The certificate of the server."""

import ssl
from pathlib import Path

from kdexport.errors import ConfigError


def tls_context(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """The context of these PEM files, None without them; raises ``ConfigError``."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        given, missing = ("--tls-cert", "--tls-key") if key is None else ("--tls-key", "--tls-cert")
        raise ConfigError(f"{given} was given without {missing}; TLS needs both.", remedy=f"Add {missing} FILE.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_certificate(context, cert, key)
    return context


def load_certificate(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Use this certificate from the next handshake on; raises ``ConfigError``, and then the old one stays."""
    try:
        # A key of another certificate is noticed only after the context has taken the certificate.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
        context.load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{cert} and {key} are not a certificate and its private key: {error}.",
            remedy="Pass the PEM file of the certificate chain as --tls-cert and that of its key as --tls-key.",
        ) from error
