"""Signatures of bundles in the format of OpenSSF model signing, made and checked without a network.

A signature lists the sha256 of every file of the bundle, the manifest among them, and is stored as ``model.sig`` in the
bundle's folder. It lists itself nowhere, so that signing changes no other file. The public key, or the certificates
that a chain must end in, come from whoever checks the signature and never from the bundle.
"""

import base64
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdexport.bundle.layout import MANIFEST, SIGNATURE
from kdexport.bundle.manifest import (
    EMPTY_FOLDER,
    HARD_LINK,
    hash_files,
    irregular_entries,
    listed_changes,
    read_manifest,
    require_unchanged,
)
from kdexport.core.digests import sha256_bytes, sha256_file
from kdexport.core.files import remove_partials, scratch_folder, write_file
from kdexport.errors import BackendUnavailableError, BundleError, ConfigError, SignatureError, first_line

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.x509 import Certificate
    from model_signing.hashing import Config as Hashing
    from model_signing.verifying import Config as Verifying

_PACKAGES = ("model_signing", "OpenSSL")
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_MAX_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Signer:
    """Who signed a bundle, and the manifest that was signed.

    ``fingerprint`` is the sha256 of the public key in PEM (of its file, as ``sha256sum`` prints it), or that of the
    certificate in DER. ``name`` is ``key`` or the subject of the certificate.
    """

    kind: str
    name: str
    fingerprint: str
    files: int
    manifest_sha256: str

    def __str__(self) -> str:
        return f"{self.name}, sha256 {self.fingerprint}"

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def sign_bundle(folder: Path, *, key: Path, certificate: Path | None = None) -> Signer:
    """Sign all files of a bundle and write ``model.sig``; an earlier signature is replaced.

    ``key`` is a private elliptic curve key in PEM; ``certificate`` is a PEM file with the certificate of this key,
    followed by those between it and the root. Raises ``VerificationError`` if the files differ from the manifest.
    """
    _require_packages()
    folder = folder.resolve()
    manifest = read_manifest(folder)
    _require_regular(folder)
    # Of a process that was killed while it signed.
    remove_partials(folder)
    require_unchanged(folder, manifest)
    public = _private_key(key).public_key()
    signer = _key_signer(public) if certificate is None else _certificate_signer(certificate, public)

    from model_signing.signing import Config

    config = Config().set_hashing_config(_hashing())  # type: ignore[no-untyped-call]
    if certificate is None:
        config.use_elliptic_key_signer(private_key=key)
    else:
        # The library reads no empty chain, and only the first certificate of the first file. That one twice is allowed.
        config.use_certificate_signer(private_key=key, signing_certificate=certificate, certificate_chain=[certificate])
    write_file(folder / SIGNATURE, lambda partial: config.sign(folder, partial))
    return Signer(**signer, files=len(manifest.files) + 1, manifest_sha256=sha256_file(folder / MANIFEST))


def require_signed(folder: Path, trusted: Path) -> Signer:
    """The signer of a bundle, if ``model.sig`` is a signature of exactly its files that ``trusted`` verifies.

    ``trusted`` is a PEM file: one public key, or the certificates that the signer's chain must end in. Raises
    ``SignatureError`` with what is wrong.
    """
    _require_packages()
    folder = folder.resolve()
    certificates, public = _trusted(trusted)
    if not (folder / MANIFEST).is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}.", remedy="Pass a folder written by kdexport build."
        )
    _require_regular(folder)
    content = _read_signature(folder)
    material, signed = _parse(content, folder)
    signer = (
        _check_key(material, public, folder) if public is not None else _check_chain(material, certificates, folder)
    )

    from model_signing.verifying import Config

    config = Config().set_hashing_config(_hashing())  # type: ignore[no-untyped-call]
    if public is not None:
        config.use_elliptic_key_verifier(public_key=trusted)
    else:
        config.use_certificate_verifier(certificate_chain=[trusted])
    _verify(config, folder, content, signed)
    return Signer(**signer, files=len(signed), manifest_sha256=signed[MANIFEST])


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"Signatures need packages that are not installed: {', '.join(missing)}.",
            remedy="Run pip install 'kdexport[sign]'.",
        )


def _require_regular(folder: Path) -> None:
    for name, kind in irregular_entries(folder).items():
        # The digest of a hard link's content is signed like that of any file.
        if kind not in (EMPTY_FOLDER, HARD_LINK):
            raise BundleError(
                f"{folder / name} is {kind}; a signed bundle may have regular files only.",
                remedy=f"Copy the bundle with the contents of its links: cp -rL {folder} NEW_FOLDER",
            )


def _hashing() -> "Hashing":
    """sha256 of every file except the signature; by default the library would also leave out files of git."""
    from model_signing.hashing import Config

    hashing: Hashing = Config()  # type: ignore[no-untyped-call]
    return hashing.use_file_serialization().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _private_key(path: Path) -> "EllipticCurvePrivateKey":
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    remedy = "Make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
    try:
        key = load_pem_private_key(_read_pem(path, "private key"), None)
    except TypeError:
        raise ConfigError(
            f"The private key {path} is encrypted; kdexport sign reads keys without a password only.",
            remedy=f"Decrypt it to a place that only you can read: openssl pkey -in {path} -out key.pem",
        ) from None
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{path} is not a private key in PEM: {first_line(error)}.", remedy=remedy) from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise ConfigError(f"{path} is not an elliptic curve key of {', '.join(_CURVES)}.", remedy=remedy)
    return key


def _read_pem(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"The {what} {path} cannot be read: {error.strerror or error}.", remedy="Pass a readable PEM file."
        ) from error


def _pem(public: "EllipticCurvePublicKey") -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _key_signer(public: "EllipticCurvePublicKey") -> dict[str, str]:
    return {"kind": "key", "name": "key", "fingerprint": sha256_bytes(_pem(public))}


def _certificate_signer(path: Path, public: "EllipticCurvePublicKey") -> dict[str, str]:
    from cryptography.x509 import load_pem_x509_certificate

    try:
        certificate = load_pem_x509_certificate(_read_pem(path, "certificate"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is not a certificate in PEM: {first_line(error)}.",
            remedy="Pass the certificate of the key, followed by those between it and the root.",
        ) from error
    if certificate.public_key() != public:
        raise ConfigError(
            f"The first certificate of {path}, {certificate.subject.rfc4514_string()}, is of another key.",
            remedy="Pass the private key of this certificate as --key; the signer's certificate must be the first.",
        )
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise ConfigError(
            f"The certificate {certificate.subject.rfc4514_string()} is valid from {certificate.not_valid_before_utc} "
            f"to {certificate.not_valid_after_utc}; now it is {now:%Y-%m-%d %H:%M} UTC.",
            remedy="Sign with a certificate that is valid today.",
        )
    return _described(certificate)


def _described(certificate: "Certificate") -> dict[str, str]:
    from cryptography.hazmat.primitives.hashes import SHA256

    return {
        "kind": "certificate",
        "name": certificate.subject.rfc4514_string(),
        "fingerprint": certificate.fingerprint(SHA256()).hex(),
    }


def _trusted(path: Path) -> "tuple[list[Certificate], EllipticCurvePublicKey | None]":
    """The certificates of a PEM file, or its public key."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from cryptography.x509 import load_pem_x509_certificates

    content = _read_pem(path, "public key or certificate")
    remedy = "Pass the signer's public key (openssl pkey -in key.pem -pubout) or the root certificate of its chain."
    try:
        if b"BEGIN CERTIFICATE" in content:
            return load_pem_x509_certificates(content), None
        public = load_pem_public_key(content)
    except ValueError as error:
        raise ConfigError(f"{path} is neither a public key nor a certificate in PEM.", remedy=remedy) from error
    if not isinstance(public, EllipticCurvePublicKey) or public.curve.name not in _CURVES:
        raise ConfigError(f"{path} is not an elliptic curve key of {', '.join(_CURVES)}.", remedy=remedy)
    return [], public


def _read_signature(folder: Path) -> bytes:
    path = folder / SIGNATURE
    if not path.is_file():
        raise SignatureError(
            f"{folder} is not signed: it has no {SIGNATURE}.", remedy=f"Sign it: kdexport sign {folder} --key key.pem"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise _damaged(folder, f"it has {path.stat().st_size:,} bytes (up to {_MAX_BYTES:,} allowed)")
    return path.read_bytes()


def _parse(content: bytes, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The verification material and the signed sha256 of each file, none of it checked yet."""
    try:
        bundle = json.loads(content)
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
        predicate = statement["predicate"]
        listed = [(str(item["name"]), str(item["algorithm"]), str(item["digest"])) for item in predicate["resources"]]
        method = predicate["serialization"]["method"]
        material = dict(bundle["verificationMaterial"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {first_line(error)}") from error
    files = {name: digest for name, _, digest in listed}
    if method != "files" or {algorithm for _, algorithm, _ in listed} != {"sha256"} or len(files) != len(listed):
        raise _damaged(folder, "it does not have one sha256 for each file")
    if MANIFEST not in files:
        raise _damaged(folder, f"it does not cover {MANIFEST}")
    return material, files


def _damaged(folder: Path, reason: str) -> SignatureError:
    return SignatureError(
        f"{folder / SIGNATURE} is not a signature that can be checked: {reason}.",
        remedy="Copy the bundle again, or sign it again with kdexport sign.",
    )


def _check_key(material: dict[str, Any], public: "EllipticCurvePublicKey", folder: Path) -> dict[str, str]:
    signer = _key_signer(public)
    if "publicKey" not in material:
        raise SignatureError(
            f"{folder / SIGNATURE} was made with a certificate, and a public key was given.",
            remedy="Pass the root certificate of the signer's chain.",
        )
    named = material["publicKey"]
    hint = named.get("hint") if isinstance(named, dict) else None
    if hint != signer["fingerprint"]:
        raise SignatureError(
            f"{folder / SIGNATURE} was made with another key: sha256 {hint}, expected {signer['fingerprint']}.",
            remedy="Pass the public key of the signer, or do not use this bundle.",
        )
    return signer


def _check_chain(material: dict[str, Any], trusted: "list[Certificate]", folder: Path) -> dict[str, str]:
    """The signer's certificate, if its chain ends in a trusted one and every certificate of it is valid today.

    The library checks the chain at the start of the certificate's validity, so that there an expired one passes.
    """
    from cryptography.x509 import load_der_x509_certificate
    from OpenSSL import crypto

    if "x509CertificateChain" not in material:
        raise SignatureError(
            f"{folder / SIGNATURE} was made with a key without a certificate, and certificates were given.",
            remedy="Pass the public key of the signer.",
        )
    try:
        raw = [base64.b64decode(item["rawBytes"]) for item in material["x509CertificateChain"]["certificates"]]
        chain = [load_der_x509_certificate(item) for item in raw]
        leaf = chain[0]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {first_line(error)}") from error
    store = crypto.X509Store()
    for certificate in trusted:
        store.add_cert(crypto.X509.from_cryptography(certificate))
    others = [crypto.X509.from_cryptography(certificate) for certificate in chain[1:]]
    try:
        crypto.X509StoreContext(store, crypto.X509.from_cryptography(leaf), others).verify_certificate()
    except crypto.X509StoreContextError as error:
        at_fault = error.certificate.to_cryptography()
        raise SignatureError(
            f"The certificate of {folder / SIGNATURE}, {leaf.subject.rfc4514_string()}, is not accepted: "
            f"{first_line(error)} ({at_fault.subject.rfc4514_string()}, valid from {at_fault.not_valid_before_utc} to "
            f"{at_fault.not_valid_after_utc}).",
            remedy="Pass the root certificate of the signer's chain, or have the bundle signed again with a valid "
            "certificate.",
        ) from error
    return _described(leaf)


def _verify(config: "Verifying", folder: Path, content: bytes, signed: dict[str, str]) -> None:
    from cryptography.exceptions import InvalidSignature

    with scratch_folder("signature") as scratch:
        # The bytes that were parsed, whatever happens to the file meanwhile.
        copy = scratch / SIGNATURE
        copy.write_bytes(content)
        try:
            config.verify(folder, copy)
        except InvalidSignature as error:
            raise SignatureError(
                f"{folder / SIGNATURE} was changed, or was not made with the key that it names.",
                remedy="Copy the bundle again from its source; if that does not help, do not use it.",
            ) from error
        # The library raises errors of many types for content that is not a signature.
        except Exception as error:
            _require_same(folder, signed, error)
            raise _damaged(folder, first_line(error)) from error
    # A signature can leave out files, which the library then does not read.
    _require_same(folder, signed, None)


def _require_same(folder: Path, signed: dict[str, str], cause: Exception | None) -> None:
    present = hash_files(folder) | {MANIFEST: sha256_file(folder / MANIFEST)}
    differing = dict.fromkeys(signed.keys() - present.keys(), "missing")
    differing |= dict.fromkeys(present.keys() - signed.keys(), "not signed")
    differing |= {name: "changed" for name in signed.keys() & present.keys() if signed[name] != present[name]}
    if differing:
        raise SignatureError(
            f"{folder / SIGNATURE} is the signature of other files: {len(differing)} of {len(present)} differ: "
            f"{listed_changes(dict(sorted(differing.items())))}.",
            remedy="Copy the bundle again from its source. If it was changed on purpose, sign it again.",
        ) from cause
