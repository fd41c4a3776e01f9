"""Keys and certificate chains for signatures, made on the spot."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

Curve = ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1 | ec.SECP256K1


@dataclass(frozen=True)
class Keys:
    """A private key and its public one, as PEM files."""

    private: Path
    public: Path


@dataclass(frozen=True)
class Chain:
    """A signer's key, its certificate followed by an intermediate one, and the root, as PEM files."""

    key: Path
    certificate: Path
    root: Path


def make_keys(folder: Path, name: str = "key", curve: Curve | None = None, password: bytes | None = None) -> Keys:
    key = ec.generate_private_key(curve or ec.SECP256R1())
    keys = Keys(folder / f"{name}.pem", folder / f"{name}.pub.pem")
    _write_key(keys.private, key, password)
    keys.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return keys


def make_chain(
    folder: Path, name: str = "chain", *, from_day: float = -1, to_day: float = 1, may_sign: bool = True
) -> Chain:
    """A chain of three certificates; the signer's is valid from ``from_day`` to ``to_day``, counted from now."""
    root, middle, leaf = (ec.generate_private_key(ec.SECP384R1()) for _ in range(3))
    top = _certificate(f"{name} root", root, f"{name} root", root, authority=True, days=(-30, 30))
    between = _certificate(f"{name} intermediate", middle, f"{name} root", root, authority=True, days=(-20, 20))
    signer = _certificate(
        f"{name} signer", leaf, f"{name} intermediate", middle, authority=False, days=(from_day, to_day),
        may_sign=may_sign,
    )  # fmt: skip
    made = Chain(folder / f"{name}.key.pem", folder / f"{name}.pem", folder / f"{name}.root.pem")
    _write_key(made.key, leaf)
    made.certificate.write_bytes(signer.public_bytes(Encoding.PEM) + between.public_bytes(Encoding.PEM))
    made.root.write_bytes(top.public_bytes(Encoding.PEM))
    return made


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, password: bytes | None = None) -> None:
    encryption = NoEncryption() if password is None else BestAvailableEncryption(password)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    authority: bool,
    days: tuple[float, float],
    may_sign: bool = True,
) -> x509.Certificate:
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=may_sign and not authority, key_cert_sign=authority, crl_sign=authority,
        content_commitment=not may_sign, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .sign(issuer_key, SHA256())
    )
