"""The arms of a comparison: files of one bundle or two, checked for integrity and comparability before timing."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdexport.backends.file_interface import PLAIN_INTERFACE
from kdexport.bundle.manifest import (
    MANIFEST,
    MODEL,
    TARGETS,
    Manifest,
    changed_files,
    interface_of,
    listed_changes,
    read_manifest,
)
from kdexport.core.digests import sha256_file
from kdexport.data.preprocessing import differing_fields
from kdexport.errors import BundleError, ConfigError, MismatchError, UnknownNameError
from kdexport.registry import nearest
from kdexport.targets import DEFAULT_TARGET, parse_target
from kdexport.verify.check import has_failed, has_run

Variant = Literal["fused", "unfused"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A bundle whose files match its manifest and whose checks passed when it was built."""

    folder: Path
    manifest: Manifest

    @property
    def image_size(self) -> int:
        """Side of the input images in pixels."""
        return self.manifest.spec.image_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """One arm: the file that runs as ``target``, and the bundle folder from which a server serves it."""

    label: str
    model: Path
    folder: Path
    sha256: str
    target: str = DEFAULT_TARGET
    variant: Variant = "fused"

    def path(self, clock: str) -> str:
        """The file or folder that a session with ``clock`` opens."""
        return str(self.folder if clock == "serve" else self.model)


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle; raises ``BundleError`` if its files differ from its manifest or its checks did not pass."""
    manifest = read_manifest(folder)
    changes = changed_files(folder, manifest.files)
    if changes:
        raise BundleError(
            f"{len(changes)} files of {folder} do not match its manifest: {listed_changes(changes)}.",
            remedy="Download or build the bundle again; nothing was timed.",
        )
    checks = list(filter(has_run, manifest.data["parity"]))
    failed = list(filter(has_failed, checks))
    if failed or not checks:
        raise BundleError(
            f"{folder} is not verified: {len(checks) - len(failed)} of {len(checks)} checks passed "
            "(all of one or more required).",
            remedy="Build the bundle again; only verified bundles are compared.",
        )
    return Bundle(folder=folder, manifest=manifest)


def require_comparable(candidate: Bundle, baseline: Bundle) -> None:
    """Raise ``MismatchError`` if two bundles differ in student, classes, image size or another preprocessing.

    Differences that come from the preprocessing would be counted as those of the network, and a server would answer
    other pixels.
    """
    one, two = candidate.manifest.spec, baseline.manifest.spec
    facts = [
        ("students", one.student, two.student),
        ("numbers of classes", one.num_classes, two.num_classes),
        ("image sizes", one.image_size, two.image_size),
    ]
    for what, mine, theirs in facts:
        if mine != theirs:
            raise MismatchError(
                f"The bundles have different {what}: {mine} in {candidate.folder}, {theirs} in {baseline.folder}.",
                remedy="Pass --baseline with a bundle of the same student, classes and image size.",
            )
    if one.classes != two.classes:
        at = next(index for index, pair in enumerate(zip(one.classes, two.classes, strict=True)) if pair[0] != pair[1])
        raise MismatchError(
            f"The bundles have different classes: class {at} is {one.classes[at]!r} in {candidate.folder} and "
            f"{two.classes[at]!r} in {baseline.folder}.",
            remedy="Pass --baseline with a bundle trained for the same classes in the same order.",
        )
    differing = differing_fields(one.preprocessing, two.preprocessing)
    if differing:
        listed = "; ".join(
            f"{name} is {getattr(one.preprocessing, name)} in {candidate.folder} and "
            f"{getattr(two.preprocessing, name)} in {baseline.folder}"
            for name in differing
        )
        raise MismatchError(
            f"The bundles have different preprocessing: {listed}.",
            remedy="Pass --baseline with a bundle of the same preprocessing.",
        )


def choose_target(bundle: Bundle, name: str | None) -> str:
    """The target to time: ``name``, by default onnx-fp32, which every bundle contains as its exported model."""
    if name is None or name == DEFAULT_TARGET:
        return DEFAULT_TARGET
    parse_target(name)
    if name not in bundle.manifest.targets:
        raise UnknownNameError(
            f"{bundle.folder} has no target {name!r}.", remedy=nearest(name, bundle.manifest.targets)
        )
    return name


def require_batches(bundle: Bundle, batches: Sequence[int]) -> None:
    """Raise ``ConfigError`` for a batch size outside of the range that the bundle was exported for."""
    export = bundle.manifest.data["export"]
    for batch in batches:
        if not export["min_batch"] <= batch <= export["max_batch"]:
            raise ConfigError(
                f"{bundle.folder} was exported for batch sizes {export['min_batch']} to {export['max_batch']}; "
                f"got {batch}.",
                remedy="Pass --batch with sizes in that range.",
            )


def require_images_per_run(targets: Sequence[str], batches: Sequence[int]) -> None:
    """Raise ``ConfigError`` for a batch of a target whose runtime takes one image at a time."""
    for target in map(parse_target, targets):
        batch = max(batches)
        if target.runtime.one_at_a_time and batch > 1:
            raise ConfigError(
                f"{target.runtime.title} runs one image at a time: a batch of {batch} on {target} would be {batch} "
                "runs.",
                remedy="Pass --batch 1, or another target.",
            )


def artifact(bundle: Bundle, target: str, variant: Variant, scratch: Path) -> Artifact:
    """The file of one arm. The unfused student is exported into ``scratch`` in the same way as by `kdexport build`,
    and runs in float32 in the runtime of ``target``.
    """
    wanted = parse_target(target)
    if variant == "unfused":
        if wanted.compiles:
            raise ConfigError(
                f"{target} cannot be compared with the unfused student: a bundle contains no engine of it.",
                remedy="Pass --against with another target, or --baseline with another bundle.",
            )
        return _unfused_arm(bundle, target, scratch)
    placed = bundle.folder / TARGETS / target / wanted.artifact
    # The float32 target of onnxruntime is the exported model itself.
    model = bundle.folder / MODEL if target == DEFAULT_TARGET and not placed.is_file() else placed
    if not model.is_file():
        raise BundleError(
            f"{bundle.folder} contains no {placed.name} for {target}.",
            remedy=f"Build the bundle again with --target {target}.",
        )
    return _artifact(f"{bundle.folder} fused {target}", bundle.folder, model, target, variant)


def _artifact(label: str, folder: Path, model: Path, target: str, variant: Variant) -> Artifact:
    return Artifact(label=label, model=model, folder=folder, sha256=sha256_file(model), target=target, variant=variant)


def _unfused_arm(bundle: Bundle, target: str, scratch: Path) -> Artifact:
    """The unfused student in float32 in the runtime of ``target``, with the same input and outputs."""
    folder = _unfused_twin(bundle, scratch)
    name, interface = f"{parse_target(target).backend}-fp32", interface_of(bundle.manifest, target)
    model = folder / MODEL
    if interface != PLAIN_INTERFACE:
        model = folder / TARGETS / name / MODEL
        _give_interface(folder, bundle, target, model)
    return _artifact(f"{bundle.folder} unfused fp32", folder, model, name, "unfused")


def _give_interface(folder: Path, bundle: Bundle, target: str, model: Path) -> None:
    """Write the unfused student of the twin ``folder`` with the interface of ``target``, as the target of ``model``."""
    import onnx

    from kdexport.graph.interface import with_interface

    interface = interface_of(bundle.manifest, target)
    model.parent.mkdir(parents=True, exist_ok=True)
    plain = onnx.load(str(folder / MODEL))
    onnx.save(with_interface(plain, interface, bundle.manifest.spec.preprocessing), str(model))
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"][model.relative_to(folder).as_posix()] = sha256_file(model)
    manifest["targets"].setdefault(model.parent.name, manifest["targets"][target])
    manifest["targets"][model.parent.name] |= {"input": interface.takes, "output": interface.gives}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _unfused_twin(bundle: Bundle, scratch: Path) -> Path:
    """A copy of the bundle with the unfused student as its model, so that the server can be timed with it too.

    It is deleted when the comparison ends and must not be published: its checks are those of the fused student.
    """
    from kdexport.bundle.manifest import load_unfused
    from kdexport.bundle.slim_form import require_whole
    from kdexport.graph.export import export_onnx

    require_whole(bundle.folder, bundle.manifest)
    folder = scratch / f"unfused-{bundle.manifest.build_key[:12]}"
    if folder.is_dir():
        return folder
    shutil.copytree(bundle.folder, folder)
    module = load_unfused(bundle.folder, bundle.manifest.spec)
    # A graph that takes pixels says how it normalises them.
    metadata = {"preprocessing": bundle.manifest.spec.preprocessing.to_json()}
    export_onnx(module, folder / MODEL, image_size=bundle.image_size, opset=bundle.manifest.opset, metadata=metadata)
    data = dict(bundle.manifest.data)
    data["files"] = {**bundle.manifest.files, MODEL: sha256_file(folder / MODEL)}
    # The logits that the targets computed at the build are those of the fused student.
    data["targets"] = {
        name: {key: value for key, value in entry.items() if key != "golden"}
        for name, entry in bundle.manifest.targets.items()
    }
    (folder / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    return folder
