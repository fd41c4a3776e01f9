"""Load a bundle for serving: check its files, open its graph on the provider, and compare its golden images."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.engine_cache import engine_facts, kept_engine
from kdexport.backends.file_interface import PLAIN_INTERFACE, FileInterface
from kdexport.backends.ort import CPU, TENSORRT, OrtModel, load_model, tensorrt_profile
from kdexport.backends.pixel_input import FLOAT32, Given, arrange, image_shape
from kdexport.bundle.manifest import (
    EMPTY_FOLDER,
    HARD_LINK,
    MANIFEST,
    MODEL,
    TARGETS,
    VERIFIED,
    Manifest,
    changed_files,
    interface_of,
    irregular_entries,
    listed_changes,
    read_manifest,
)
from kdexport.bundle.signature import Signer, require_signed
from kdexport.core.digests import sha256_bytes, sha256_file
from kdexport.core.extras import missing_package
from kdexport.errors import AuditError, BundleError, KdexportError, VerificationError, first_line
from kdexport.serving.batching import UNKNOWN_PACE, Pace
from kdexport.serving.images import normalisation_table, normalise
from kdexport.serving.limits import Limits
from kdexport.serving.self_check import Golden, compare_golden
from kdexport.serving.wire import Signature
from kdexport.targets import DEFAULT_TARGET, parse_target, require_servable
from kdexport.verify.check import has_failed, has_run
from kdexport.verify.golden_limits import own_logits

#: kdexport raises these itself while it reads a bundle, so their text is its own.
_FOREIGN = "unknown"
_OWN_CAUSES = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def served_file(manifest: Manifest, target: str) -> str:
    """The path of ``target``'s graph in its bundle; raises ``BundleError`` if it was not built or not verified."""
    if target == DEFAULT_TARGET and interface_of(manifest, target) == PLAIN_INTERFACE:
        return MODEL
    entry = manifest.targets.get(target)
    if entry is None or entry["status"] != VERIFIED:
        state = "was not built" if entry is None else f"is {entry['status']!r}, not verified"
        raise BundleError(
            f"{target} {state}; the targets of the bundle are {', '.join(sorted(manifest.targets)) or 'none'}.",
            remedy=f"Build the bundle with --target {target}.",
        )
    return f"{TARGETS}/{target}/{MODEL}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedModel:
    """A model of a bundle that passed all checks in this process."""

    name: str
    version: int
    digest: str
    manifest: Manifest
    provider: str
    target: str
    ort: OrtModel
    signature: Signature
    table: NDArray[np.float32]
    golden: Golden
    pace: Pace = UNKNOWN_PACE
    #: Who signed the bundle, if the server requires signatures.
    signer: Signer | None = None

    @property
    def contract(self) -> dict[str, Any]:
        """What clients rely on: input, outputs, classes and preprocessing. All versions of a model share it."""
        tensor = asdict(self.signature)
        classes, outputs = tensor.pop("classes"), tensor.pop("outputs")
        # Clients learn of another limit by an error; it changes the meaning of no request.
        tensor.pop("max_batch")
        preprocessing = self.manifest.spec.preprocessing.to_json()
        return {"input": tensor, "outputs": outputs, "classes": classes, "preprocessing": preprocessing}

    def logits(self, images: Given) -> NDArray[np.float32]:
        """n images, each as ``signature`` says, to (n,K) float32."""
        return self.ort.logits(images)

    def tensor(self, pixels: NDArray[np.uint8]) -> Given:
        """(S,S,3) uint8 to a batch of one image as ``signature`` says."""
        if self.signature.takes != FLOAT32:
            return arrange(pixels[np.newaxis], self.signature.takes)
        return normalise(pixels, self.table)


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """The manifest of a bundle whose files match their digests, and the graph of one target as read from disk."""

    manifest: Manifest
    digest: str
    name: str
    graph: bytes
    #: Who signed it, if that was checked.
    signer: Signer | None = None


def read_files(folder: Path, target: str = DEFAULT_TARGET, trusted: Path | None = None) -> Files:
    """Check every file of a bundle and read the graph of ``target``.

    With ``trusted`` the signature is checked before anything else is read; see ``require_signed``. Raises
    ``BundleError``, ``SignatureError`` or ``VerificationError``.
    """
    folder = folder.resolve()
    signer = None if trusted is None else require_signed(folder, trusted)
    require_plain_files(folder)
    digest = bundle_digest(folder)
    if signer is not None and signer.manifest_sha256 != digest:
        raise _changed(folder)
    manifest = read_manifest(folder)
    require_unchanged_files(folder, manifest)
    name = served_file(manifest, target)
    _require_verified(folder, manifest, name)
    graph = (folder / name).read_bytes()
    if sha256_bytes(graph) != manifest.files.get(name) or bundle_digest(folder) != digest:
        raise _changed(folder)
    return Files(manifest=manifest, digest=digest, name=name, graph=graph, signer=signer)


def require_unchanged_files(folder: Path, manifest: Manifest) -> None:
    """Raise ``VerificationError`` that names the files that are not those of the manifest, and what to do."""
    changes = changed_files(folder, manifest.files)
    if not changes:
        return
    foreign = [name for name, change in changes.items() if change == _FOREIGN]
    if len(foreign) == len(changes):
        raise VerificationError(
            f"{folder} has {len(foreign)} files that its manifest does not list: {listed_changes(changes)}.",
            remedy=f"Move them out of {folder}; all other files are those that were verified.",
        )
    raise VerificationError(
        f"{len(changes)} files of {folder} differ from those that were verified: {listed_changes(changes)}.",
        remedy="Copy the bundle again, or build it again.",
    )


def require_same_contract(fresh: LoadedModel, served: Iterable[LoadedModel], folder: Path) -> None:
    """Raise ``BundleError`` if clients of a served version of the same name would get something else from ``fresh``."""
    for model in served:
        old, new = model.contract, fresh.contract
        different = [key for key in old if old[key] != new[key]]
        if different:
            counts = len(old["classes"]), len(new["classes"])
            detail = "" if counts[0] == counts[1] else f" ({counts[0]} classes are served, the bundle has {counts[1]})"
            raise BundleError(
                f"{folder} and the served version {model.version} of {model.name} differ in {', '.join(different)}"
                f"{detail}; clients rely on them.",
                remedy=f"Serve it under another name: kdexport serve NAME={folder}",
            )


def _changed(folder: Path) -> VerificationError:
    return VerificationError(
        f"{folder} changed while it was read.",
        remedy="Copy the new bundle to another folder and rename that folder into place.",
    )


def bundle_digest(folder: Path) -> str:
    """The sha256 of the manifest, which lists the sha256 of every other file."""
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}.", remedy="Pass a folder that `kdexport build` wrote."
        )
    return sha256_file(path)


def require_plain_files(folder: Path) -> None:
    """Raise ``BundleError`` for a link or device inside: files outside the folder were never verified."""
    for name, kind in irregular_entries(folder).items():
        # A hard link is a regular file of this folder, and what is read of it has the digest of the manifest. Another
        # link to it, as backups make them, must not end the service.
        if kind not in (EMPTY_FOLDER, HARD_LINK):
            raise BundleError(
                f"{folder / name} is {kind}; a bundle may have regular files only.",
                remedy=f"Copy the bundle with the contents of its links: cp -rL {folder} NEW_FOLDER",
            )


def _require_verified(folder: Path, manifest: Manifest, name: str) -> None:
    checks = manifest.data["parity"]
    failed = list(filter(has_failed, checks))
    ran = list(filter(has_run, checks))
    if failed or not any(str(check.get("subject", "")).startswith(name) for check in ran):
        raise VerificationError(
            f"{folder} was not verified: {len(failed)} of {len(ran)} checks in its manifest failed."
            if failed
            else f"{folder} was not verified: its manifest has no check of {name}.",
            remedy="Build the bundle again; only verified bundles are served.",
        )


def load(
    folder: Path,
    *,
    name: str,
    version: int,
    provider: str,
    limits: Limits,
    allowed_error: float,
    target: str = DEFAULT_TARGET,
    trusted: Path | None = None,
    engines: Path | None = None,
) -> LoadedModel:
    """Check the files, open the graph of ``target`` on ``provider`` and compare the golden images.

    With ``trusted`` the signature is checked first; see ``require_signed``. The TensorRT provider keeps its engine in
    ``engines``; see ``kept_engine``. Raises ``KdexportError``.
    """
    require_servable(target, provider)
    files = read_files(folder, target, trusted)
    manifest = files.manifest
    threads = 1 if provider == CPU else 0
    with _provider_options(files, target, provider, engines) as options:
        model = load_model(
            folder / files.name, provider=provider, threads=threads, content=files.graph, provider_options=options
        )
        elsewhere = {key: count for key, count in model.nodes_by_provider.items() if key != provider}
        if elsewhere:
            raise AuditError(
                f"Some nodes of {name} do not run on {provider}: {elsewhere}.",
                remedy="Install the libraries of that provider, or choose another --provider.",
            )
        signature = _signature(model, manifest, limits, interface_of(manifest, target))
        table = normalisation_table(manifest.spec.preprocessing)
        own = own_logits(folder, manifest, target)
        golden = compare_golden(folder, manifest, model, table, limits, allowed_error, own)
    return LoadedModel(
        name=name,
        version=version,
        digest=files.digest,
        manifest=manifest,
        provider=provider,
        target=target,
        ort=model,
        signature=signature,
        table=table,
        golden=golden,
        signer=files.signer,
    )


@contextlib.contextmanager
def _provider_options(files: Files, target: str, provider: str, engines: Path | None) -> Iterator[Mapping[str, str]]:
    """The options of ``provider`` for the start of one model."""
    if provider != TENSORRT:
        yield {}
        return
    shapes = _engine_shapes(files.manifest, target)
    facts = engine_facts(files.graph, parse_target(target).precision, shapes) if engines is not None else {}
    # Without TensorRT the session says which library is missing.
    if engines is None or not facts["tensorrt"]:
        yield shapes
        return
    with kept_engine(engines, facts) as kept:
        yield {**shapes, **kept}


def _engine_shapes(manifest: Manifest, target: str) -> dict[str, str]:
    export = manifest.data["export"]
    shape = image_shape(interface_of(manifest, target).takes, manifest.spec.image_size)
    return tensorrt_profile(shape, (int(export["min_batch"]), int(export["max_batch"])))


def _signature(model: OrtModel, manifest: Manifest, limits: Limits, interface: FileInterface) -> Signature:
    inputs, outputs, takes = model.session.get_inputs(), model.session.get_outputs(), interface.takes
    size, classes = manifest.spec.image_size, manifest.spec.classes
    results = [(item.name, *item.shape[1:]) for item in outputs]
    found = [len(inputs), inputs[0].type, list(inputs[0].shape[1:]), results]
    shape = list(image_shape(takes, size))
    wanted = "tensor(float)" if takes == FLOAT32 else "tensor(uint8)"
    written = FLOAT32 if model.takes is None else model.takes.kind
    given = [(name, len(classes)) for name in interface.outputs]
    if found != [1, wanted, shape, given] or written != takes:
        raise AuditError(
            f"The inputs and outputs of {MODEL} are {found}; the manifest requires one {takes} input {['n', *shape]} "
            f"and the outputs {' and '.join(interface.outputs)} of {len(classes)} classes.",
            remedy="Build the bundle again.",
        )
    tensor_bytes = (12 if takes == FLOAT32 else 3) * size * size
    return Signature(
        input_name=inputs[0].name,
        outputs=interface.outputs,
        image_size=size,
        classes=classes,
        max_batch=min(int(manifest.data["export"]["max_batch"]), limits.images_per_body(tensor_bytes)),
        takes=takes,
    )


def as_kdexport_error(error: Exception, folder: Path) -> KdexportError:
    """``error`` if it is one of kdexport's, else a ``BundleError`` with the name of its type."""
    if isinstance(error, KdexportError):
        return error
    missing = missing_package(error)
    if missing is not None:
        return missing
    wrapped = BundleError(
        f"{folder} cannot be loaded ({type(error).__name__}).",
        remedy=f"Build the bundle again; `kdexport doctor {folder} --debug` shows where the error was raised.",
    )
    wrapped.__cause__ = error
    return wrapped


def without_library_text(error: KdexportError, folder: Path) -> KdexportError:
    """``error`` with the name of a library's exception in place of its text, if the message quotes one.

    The reason of a refused bundle reaches clients (/v2/repository/index), and the text of a library may hold addresses
    of memory.
    """
    cause = error.__cause__
    if cause is None or isinstance(cause, KdexportError) or type(cause) in _OWN_CAUSES:
        return error
    name = type(cause).__name__
    message = error.message
    for text in (str(cause), first_line(cause)):
        message = message.replace(f"{name}: {text}", name).replace(text, name) if text else message
    if message != error.message:
        error.message = message
        error.remedy = f"{error.remedy} `kdexport doctor {folder}` shows the message of {name}."
    return error
