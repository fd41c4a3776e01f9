"""A signature covers every file of a bundle, and each way in which it fails has its own error."""

import base64
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from kdexport.bundle import signature
from kdexport.bundle.manifest import MANIFEST, hash_files
from kdexport.bundle.signature import require_signed, sign_bundle
from kdexport.errors import BackendUnavailableError, BundleError, ConfigError, SignatureError, VerificationError
from kdexport.verify import verdict
from kdexport.verify.verdict import Verdict
from tests.conftest import Command
from tests.kdexport.signing_keys import Chain, Keys, make_chain, make_keys


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path)


@pytest.fixture
def signed(bundle_copy: Path, keys: Keys) -> Path:
    sign_bundle(bundle_copy, key=keys.private)
    return bundle_copy


def parts(folder: Path) -> tuple[dict[str, Any], bytes, bytes]:
    """The signature file, the signed statement, and the bytes of the signature."""
    stored = json.loads((folder / "model.sig").read_text())
    envelope = stored["dsseEnvelope"]
    return stored, base64.b64decode(envelope["payload"]), base64.b64decode(envelope["signatures"][0]["sig"])


def refused(folder: Path, trusted: Path) -> str:
    with pytest.raises(SignatureError) as caught:
        require_signed(folder, trusted)
    assert caught.value.code == "KDX332"
    assert caught.value.remedy
    return caught.value.message


def test_the_signature_is_one_of_the_sha256_of_every_file_for_any_program(signed: Path, keys: Keys) -> None:
    """Checked with hashlib and ECDSA alone, without the library that made it."""
    _, statement, raw = parts(signed)
    kind = "application/vnd.in-toto+json"
    public = load_pem_public_key(keys.public.read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(raw, f"DSSEv1 {len(kind)} {kind} {len(statement)} ".encode() + statement, ec.ECDSA(SHA256()))
    listed = {item["name"]: item["digest"] for item in json.loads(statement)["predicate"]["resources"]}
    paths = [path for path in signed.rglob("*") if path.is_file() and path.name != "model.sig"]
    assert listed == {str(p.relative_to(signed)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    assert {"manifest.json", "model.onnx", "golden/000.png"} < listed.keys()


def test_signing_changes_no_file_and_a_copy_elsewhere_still_verifies(
    bundle_copy: Path, keys: Keys, tmp_path: Path
) -> None:
    before = {**hash_files(bundle_copy), MANIFEST: hashlib.sha256((bundle_copy / MANIFEST).read_bytes()).hexdigest()}
    made = sign_bundle(bundle_copy, key=keys.private)
    after = {**hash_files(bundle_copy), MANIFEST: hashlib.sha256((bundle_copy / MANIFEST).read_bytes()).hexdigest()}
    assert before == after
    elsewhere = shutil.copytree(bundle_copy, tmp_path / "another" / "name")
    found = require_signed(elsewhere, keys.public)
    assert found == made
    assert found.files == len(before)
    assert found.manifest_sha256 == before[MANIFEST]
    assert found.fingerprint == hashlib.sha256(keys.public.read_bytes()).hexdigest()


def test_a_new_signature_replaces_the_old_one_and_removes_what_a_killed_one_left(signed: Path, tmp_path: Path) -> None:
    (signed / ".model.sig.partial-123").write_text("half")
    other = make_keys(tmp_path, "other", ec.SECP521R1())
    sign_bundle(signed, key=other.private)
    assert require_signed(signed, other.public).kind == "key"
    assert not list(signed.glob(".*"))


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "golden/000.png", "report.md"])
def test_a_changed_file_is_named(name: str, signed: Path, keys: Keys) -> None:
    content = (signed / name).read_bytes()
    (signed / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f" differ: {name} changed." in refused(signed, keys.public)


def test_an_added_and_a_missing_file_are_named(signed: Path, keys: Keys) -> None:
    (signed / ".gitignore").write_text("*")
    (signed / "report.md").unlink()
    assert refused(signed, keys.public).endswith(" differ: .gitignore not signed, report.md missing.")


def test_the_signature_of_another_bundle_is_refused(signed: Path, keys: Keys, tmp_path: Path) -> None:
    other = Path(shutil.copytree(signed, tmp_path / "other"))
    data = json.loads((other / MANIFEST).read_text())
    (other / MANIFEST).write_text(json.dumps(data))
    sign_bundle(other, key=keys.private)
    shutil.copyfile(other / "model.sig", signed / "model.sig")
    assert "is the signature of other files: 1 of " in refused(signed, keys.public)


def test_a_signature_that_leaves_out_files_is_refused(signed: Path, keys: Keys) -> None:
    """The library accepts a signed list of paths to ignore."""
    from model_signing import hashing, signing

    config = hashing.Config().set_ignored_paths(paths=["model.sig", "targets"])  # type: ignore[no-untyped-call]
    maker = signing.Config().set_hashing_config(config)  # type: ignore[no-untyped-call]
    maker.use_elliptic_key_signer(private_key=keys.private).sign(signed, signed / "model.sig")
    assert "targets/onnx-fp32/model.onnx not signed" in refused(signed, keys.public)


def test_another_key_is_refused_with_both_fingerprints(signed: Path, keys: Keys, tmp_path: Path) -> None:
    other = make_keys(tmp_path, "other")
    message = refused(signed, other.public)
    for path in (keys.public, other.public):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in message


def test_a_key_that_only_claims_to_be_the_trusted_one_is_refused(signed: Path, keys: Keys, tmp_path: Path) -> None:
    sign_bundle(signed, key=make_keys(tmp_path, "other").private)
    stored, _, _ = parts(signed)
    stored["verificationMaterial"]["publicKey"]["hint"] = hashlib.sha256(keys.public.read_bytes()).hexdigest()
    (signed / "model.sig").write_text(json.dumps(stored))
    assert "was changed, or was not made with the key that it names" in refused(signed, keys.public)


def edited(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A change of the signed statement, whose signature stays the old one."""

    def apply(folder: Path) -> None:
        stored, statement, _ = parts(folder)
        content = json.loads(statement)
        edit(content)
        stored["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(content).encode()).decode()
        (folder / "model.sig").write_text(json.dumps(stored))

    return apply


def with_envelope(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        stored, _, _ = parts(folder)
        edit(stored)
        (folder / "model.sig").write_text(json.dumps(stored))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model.sig").unlink(), "is not signed: it has no model.sig"),
        (lambda folder: (folder / "model.sig").write_bytes(b""), "is not a signature that can be checked"),
        (lambda folder: (folder / "model.sig").write_bytes(b"\xff\x00"), "is not a signature that can be checked"),
        (lambda folder: (folder / "model.sig").write_text("[" * 100_000), "is not a signature that can be checked"),
        (lambda folder: (folder / "model.sig").write_text("[]"), "is not a signature that can be checked"),
        (lambda folder: (folder / "model.sig").write_bytes(b" " * (2**24 + 1)), "up to 16,777,216 allowed"),
        (edited(lambda content: content.update(added=1)), "was changed, or was not made with the key"),
        (edited(lambda content: content["predicate"]["resources"].clear()), "is not a signature that can be checked"),
        (edited(lambda c: c["predicate"].update(resources=c["predicate"]["resources"][:3])), "does not cover manifest"),
        (edited(lambda c: c["predicate"]["resources"][0].update(algorithm="md5")), "one sha256 for each file"),
        (edited(lambda c: c["predicate"]["serialization"].update(method="shards")), "one sha256 for each file"),
        (with_envelope(lambda s: s["dsseEnvelope"].update(signatures=[])), "is not a signature that can be checked"),
        (with_envelope(lambda s: s.update(mediaType="other")), "is not a signature that can be checked"),
        (with_envelope(lambda s: s["verificationMaterial"].update(publicKey=None)), "was made with another key"),
        (with_envelope(lambda s: s["verificationMaterial"]["publicKey"].clear()), "was made with another key"),
    ],
)
def test_each_damaged_signature_is_one_clear_error(
    damage: Callable[[Path], object], words: str, signed: Path, keys: Keys
) -> None:
    damage(signed)
    assert words in refused(signed, keys.public)


@pytest.mark.parametrize("name", ["model.sig", "report.md"])
def test_a_link_in_a_signed_bundle_is_refused(name: str, signed: Path, keys: Keys, tmp_path: Path) -> None:
    (signed / name).rename(tmp_path / "elsewhere")
    (signed / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"is a symbolic link; a signed bundle may have regular files only"):
        require_signed(signed, keys.public)


def test_certificates_verify_by_their_root_and_name_the_subject(bundle_copy: Path, tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    sign_bundle(bundle_copy, key=chain.key, certificate=chain.certificate)
    found = require_signed(bundle_copy, chain.root)
    assert (found.kind, found.name) == ("certificate", "CN=chain signer")
    leaf = x509.load_pem_x509_certificate(chain.certificate.read_bytes())
    assert found.fingerprint == leaf.fingerprint(SHA256()).hex()


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chain]:
    folder = tmp_path_factory.mktemp("chains")
    return {
        "good": make_chain(folder, "good"),
        "other": make_chain(folder, "other"),
        "no signer": make_chain(folder, "no signer", may_sign=False),
    }


def test_a_certificate_of_another_root_or_without_the_right_to_sign_is_refused(
    bundle_copy: Path, chains: dict[str, Chain]
) -> None:
    sign_bundle(bundle_copy, key=chains["good"].key, certificate=chains["good"].certificate)
    message = refused(bundle_copy, chains["other"].root)
    assert "CN=good signer, is not accepted: unable to get local issuer certificate" in message
    sign_bundle(bundle_copy, key=chains["no signer"].key, certificate=chains["no signer"].certificate)
    assert "Signing certificate cannot be used for signing" in refused(bundle_copy, chains["no signer"].root)


@pytest.mark.parametrize(("days", "words"), [((-9.0, -1.0), "certificate has expired"), ((1.0, 2.0), "not yet valid")])
def test_a_certificate_that_is_not_valid_today_is_refused_when_it_signs_and_when_it_is_checked(
    days: tuple[float, float], words: str, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = make_chain(tmp_path, from_day=days[0], to_day=days[1])
    with pytest.raises(ConfigError, match="The certificate CN=chain signer is valid from "):
        sign_bundle(bundle_copy, key=chain.key, certificate=chain.certificate)
    assert not (bundle_copy / "model.sig").exists()
    monkeypatch.setattr(signature, "_certificate_signer", lambda *_: {"kind": "", "name": "", "fingerprint": ""})
    sign_bundle(bundle_copy, key=chain.key, certificate=chain.certificate)
    message = refused(bundle_copy, chain.root)
    assert words in message
    assert "(CN=chain signer, valid from 20" in message


def test_keys_and_certificates_are_not_mixed_up(bundle_copy: Path, keys: Keys, chains: dict[str, Chain]) -> None:
    sign_bundle(bundle_copy, key=keys.private)
    assert "was made with a key without a certificate" in refused(bundle_copy, chains["good"].root)
    sign_bundle(bundle_copy, key=chains["good"].key, certificate=chains["good"].certificate)
    assert "was made with a certificate, and a public key was given" in refused(bundle_copy, keys.public)
    with pytest.raises(ConfigError, match=r"The first certificate of .*, CN=good signer, is of another key"):
        sign_bundle(bundle_copy, key=keys.private, certificate=chains["good"].certificate)


def test_files_that_are_no_usable_keys_are_refused(bundle_copy: Path, keys: Keys, tmp_path: Path) -> None:
    locked = make_keys(tmp_path, "locked", password=b"secret").private
    foreign = make_keys(tmp_path, "foreign", ec.SECP256K1())
    for path, words in (
        (tmp_path / "nothing.pem", "cannot be read: No such file or directory"),
        (bundle_copy / "report.md", "is not a private key in PEM"),
        (keys.public, "is not a private key in PEM"),
        (locked, "is encrypted; kdexport sign reads keys without a password only"),
        (foreign.private, "is not an elliptic curve key of secp256r1"),
    ):
        with pytest.raises(ConfigError, match=words):
            sign_bundle(bundle_copy, key=path)
    for path, words in (
        (tmp_path / "nothing.pem", "cannot be read: No such file or directory"),
        (bundle_copy / "report.md", "is neither a public key nor a certificate in PEM"),
        (keys.private, "is neither a public key nor a certificate in PEM"),
        (foreign.public, "is not an elliptic curve key of secp256r1"),
    ):
        with pytest.raises(ConfigError, match=words):
            require_signed(bundle_copy, path)
    with pytest.raises(ConfigError, match="is not a certificate in PEM"):
        sign_bundle(bundle_copy, key=keys.private, certificate=keys.public)
    assert not (bundle_copy / "model.sig").exists()


def test_a_damaged_bundle_is_not_signed(bundle_copy: Path, keys: Keys) -> None:
    (bundle_copy / "report.md").write_text("")
    with pytest.raises(VerificationError, match=r"report\.md changed"):
        sign_bundle(bundle_copy, key=keys.private)
    assert not (bundle_copy / "model.sig").exists()


def test_without_the_package_the_error_has_the_command_that_installs_it(
    bundle_copy: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signature, "_PACKAGES", ("model_signing", "no_such_package"))
    actions: list[Callable[[], object]] = [
        lambda: sign_bundle(bundle_copy, key=keys.private),
        lambda: require_signed(bundle_copy, keys.public),
    ]
    for act in actions:
        with pytest.raises(BackendUnavailableError) as caught:
            act()
        assert caught.value.exit_code == 4
        assert caught.value.message == "Signatures need packages that are not installed: no_such_package."
        assert caught.value.remedy == "Run pip install 'kdexport[sign]'."


def test_the_command_verify_checks_the_signature_before_it_reads_the_manifest(
    bundle_copy: Path, keys: Keys, here: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verdict, "verify_folder", lambda *_, **__: Verdict(()))
    done = here("sign", bundle_copy, "--key", keys.private, "--json")
    assert done.exit_code == 0, done.stderr
    fingerprint = hashlib.sha256(keys.public.read_bytes()).hexdigest()
    assert done.data["signed_by"]["fingerprint"] == fingerprint
    assert done.data["signature"] == str(bundle_copy / "model.sig")
    # A signature alone is no unknown file.
    assert here("verify", bundle_copy).exit_code == 0
    done = here("verify", bundle_copy, "--signature", keys.public)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(f"Signature: {done.stdout.split()[1]} files, by key, sha256 {fingerprint}.\n")
    assert here("verify", bundle_copy, "--signature", keys.public, "--json").data["signed_by"]["name"] == "key"
    policy = tmp_path / "policy.toml"
    policy.write_text("")
    arguments = ("verify", bundle_copy, "--signature", keys.public, "--rethreshold", policy, "--json")
    assert here(*arguments).data["signed_by"]["fingerprint"] == fingerprint
    (bundle_copy / MANIFEST).write_text("{")
    done = here("verify", bundle_copy, "--signature", keys.public)
    assert done.exit_code == 1
    assert done.stderr.startswith("error KDX332: ")
    assert "manifest.json changed" in done.stderr
    assert "kdexport sign" in here("explain", "KDX332").stdout


def test_a_fresh_process_needs_no_network_to_sign_and_verify(bundle_copy: Path, keys: Keys) -> None:
    code = (
        "import socket, sys\n"
        "from pathlib import Path\n"
        "def refuse(*_, **__): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from kdexport.bundle.signature import require_signed, sign_bundle\n"
        "folder, private, public = map(Path, sys.argv[1:])\n"
        "sign_bundle(folder, key=private)\n"
        "print(require_signed(folder, public).kind)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, bundle_copy, keys.private, keys.public], capture_output=True, text=True, check=True
    )
    assert done.stdout == "key\n"
