"""Which check sees a change of a bundle: the cheap ones first, then a whole verification."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
from onnx import ModelProto

from kdexport.bundle.manifest import (
    EMPTY_FOLDER,
    Manifest,
    hash_files,
    irregular_entries,
    layer_plans,
    load_unfused,
    onnx_files,
    read_manifest,
    target_of,
)
from kdexport.bundle.signature import require_signed
from kdexport.checkpoint import load_tensors
from kdexport.core.digests import sha256_bytes, sha256_file
from kdexport.errors import BundleError, CheckpointError, KdexportError, SignatureError
from kdexport.graph.equality import graph_difference
from kdexport.graph.plan import PLAIN, LayerPlan
from kdexport.reparam.fold_student import fuse_student
from kdexport.verify import verdict
from kdexport.verify.check import Check
from kdexport.verify.consistency import check_consistency
from kdexport.verify.rebuilt_graphs import RebuiltGraphs
from kdexport.verify.student_checks import (
    BundleContext,
    check_golden,
    check_integrity,
    check_weights,
    student_checks,
    weight_bits,
)
from kdexport.verify.verdict import replay

#: Columns of the result, in the order in which the checks are tried.
JUDGES = ("manifest", "files", "consistency", "graph as rebuilt", "golden", "audit", "ladder")


#: Parts of the manifest that record what the build measured. ``Judge`` shows that verification reads none of them.
RECORDS = ("certificate", "latency", "parity", "parity_images")


class _WithoutRecords(dict[str, Any]):
    """A manifest whose records cannot be read, neither by name nor by going through all of its fields."""

    def __getitem__(self, key: str) -> Any:
        _require_no_record(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        _require_no_record(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("verification goes through the whole manifest")

    keys = values = items = __iter__  # type: ignore[assignment]


def _require_no_record(key: str) -> None:
    if key in RECORDS:
        raise AssertionError(f"verification reads {key}")


class Judge:
    """Tries the checks of ``kdexport verify`` on changed copies of one bundle."""

    def __init__(self, bundle: Path, public_key: Path, scratch: Path) -> None:
        """``bundle`` is signed by the key that belongs to ``public_key``; ``scratch`` is an empty folder."""
        self._key, self._bundle = public_key, bundle
        manifest = read_manifest(bundle)
        self._rebuilt: dict[str, bytes] = {}
        self._golden: dict[str, list[Check]] = {}
        self._students: dict[str, tuple[list[Check], BundleContext | None]] = {}
        with self._remembering():
            rebuilt = RebuiltGraphs(bundle, manifest, scratch)
            self._sources = self._read_by_rebuilding(bundle, manifest)
            self._expected: dict[str, ModelProto] = {}
            for name, form in onnx_files(manifest).items():
                plan = layer_plans(manifest).get(str(target_of(name)), PLAIN)
                self._expected[name] = onnx.load(str(rebuilt.rebuild(name, form, plan, weight_bits(manifest))))
        self._unfused = _key([bundle / "unfused.safetensors"], [_described(manifest)])
        self._folded = fuse_student(load_unfused(bundle, manifest.spec)).module.state_dict()
        # No error and no failure: what a field of the records holds has no influence on any check.
        unread = replace(manifest, data=_WithoutRecords(manifest.data))
        seen, fact = self._of_verification(bundle, unread)
        if seen:
            raise ValueError(f"{bundle} does not pass its own verification: {fact}")

    def first_to_see(self, folder: Path) -> tuple[str, str]:
        """The first of ``JUDGES`` that sees a change of ``folder``, and what it says; empty if none does."""
        try:
            manifest = read_manifest(folder)
        except BundleError as error:
            return "manifest", error.message
        checks = check_integrity(folder, manifest)
        if all(kind == EMPTY_FOLDER for kind in irregular_entries(folder).values()):
            checks += check_consistency(folder, manifest)
        failed = [check for check in checks if not check.holds]
        if failed:
            whole = failed[0].subject == "bundle"
            return "files" if whole else "consistency", _said(failed[0])
        if self._only_records_differ(folder, manifest):
            return "", ""
        weights = self._of_weights(folder, manifest)
        if weights:
            return "ladder", weights
        graph = self._of_graphs(folder, manifest)
        if graph:
            return "graph as rebuilt", graph
        return self._of_verification(folder, manifest)

    def signature(self, folder: Path) -> bool:
        """Whether the signature of the unchanged bundle refuses ``folder``."""
        try:
            require_signed(folder, self._key)
        except (SignatureError, BundleError):
            return True
        return False

    def _only_records_differ(self, folder: Path, manifest: Manifest) -> bool:
        built = read_manifest(self._bundle)
        if hash_files(folder) != hash_files(self._bundle):
            return False
        mine, theirs = ({k: v for k, v in m.data.items() if k not in RECORDS} for m in (manifest, built))
        return mine == theirs

    def _of_weights(self, folder: Path, manifest: Manifest) -> str:
        """What rung A would say of the folded weights, if the unfused student is unchanged."""
        if _key([folder / "unfused.safetensors"], [_described(manifest)]) != self._unfused:
            return ""
        try:
            check = check_weights(load_tensors(folder / "student.safetensors"), self._folded)
        except CheckpointError as error:
            return error.message
        return "" if check.holds else _said(check)

    def _of_graphs(self, folder: Path, manifest: Manifest) -> str:
        """What verification would say of the graphs, if what they are rebuilt from is unchanged."""
        if self._read_by_rebuilding(folder, manifest) != self._sources:
            return ""
        for name, expected in self._expected.items():
            try:
                difference = graph_difference(onnx.load(str(folder / name)), expected)
            # A damaged file makes the reader raise errors of many types.
            except Exception as error:  # noqa: BLE001
                difference = f"cannot be read: {type(error).__name__}"
            if difference:
                return f"{name}: {difference}"
        return ""

    def _read_by_rebuilding(self, folder: Path, manifest: Manifest) -> list[Any]:
        files = [folder / "unfused.safetensors", folder / "student.safetensors", *sorted(folder.rglob("ranges.json"))]
        plans = {name: entry.get("plan") for name, entry in manifest.targets.items()}
        described = [manifest.data["student"], manifest.opset, plans, sorted(manifest.targets), weight_bits(manifest)]
        return [*(sha256_file(path) for path in files), json.dumps(described, sort_keys=True)]

    def _of_verification(self, folder: Path, manifest: Manifest) -> tuple[str, str]:
        try:
            with self._remembering():
                failed = replay(folder, manifest, lambda _: None).failures
        except KdexportError as error:
            return "ladder", error.message
        if not failed:
            return "", ""
        return _judge_of(failed[0]), _said(failed[0])

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        """Run once for the same inputs what takes most of a verification: fold, reference, export, golden logits."""
        make = RebuiltGraphs._expected

        def expected(graphs: RebuiltGraphs, path: Path, form: str, plan: LayerPlan, bits: int) -> Path:
            folder, manifest = graphs._folder, graphs._manifest
            read = [*_student_files(folder), folder / "model.onnx", *path.parent.glob("ranges.json")]
            key = _key(read, [_described(manifest), manifest.opset, form, plan.to_json(), bits])
            if key not in self._rebuilt:
                self._rebuilt[key] = make(graphs, path, form, plan, bits).read_bytes()
            rebuilt = graphs._scratch / f"{sha256_bytes(key.encode())}.onnx"
            rebuilt.write_bytes(self._rebuilt[key])
            return rebuilt

        def checked(folder: Path, manifest: Manifest, pixels: Any) -> tuple[list[Check], BundleContext | None]:
            export = [manifest.data["export"].get(name) for name in ("min_batch", "opt_batch", "max_batch", "tf32")]
            read = [_described(manifest), export, manifest.data.get("targets"), manifest.data.get("policy")]
            key = _key(_student_files(folder), [*read, sha256_bytes(pixels.tobytes())])
            if key not in self._students:
                self._students[key] = student_checks(folder, manifest, pixels)
            checks, context = self._students[key]
            return list(checks), None if context is None else replace(context, folder=folder, manifest=manifest)

        def golden(folder: Path, manifest: Manifest, pixels: Any) -> list[Check]:
            described = [_described(manifest), sha256_bytes(pixels.tobytes())]
            key = _key([folder / "unfused.safetensors", folder / "golden/logits.safetensors"], described)
            if key not in self._golden:
                self._golden[key] = check_golden(folder, manifest, pixels)
            return list(self._golden[key])

        with (
            mock.patch.object(RebuiltGraphs, "_expected", expected),
            mock.patch.object(verdict, "student_checks", checked),
            mock.patch.object(verdict, "check_golden", golden),
        ):
            yield


def _described(manifest: Manifest) -> dict[str, Any]:
    """What the student is built from: of its classes only their number."""
    return {**manifest.data["student"], "classes": manifest.spec.num_classes}


def _student_files(folder: Path) -> list[Path]:
    return [folder / "unfused.safetensors", folder / "student.safetensors"]


def _key(files: list[Path], described: list[Any]) -> str:
    return json.dumps([*(sha256_file(path) for path in files), described], sort_keys=True)


def _judge_of(check: Check) -> str:
    if check.name == "graph as rebuilt":
        return "graph as rebuilt"
    return {"files": "consistency", "golden": "golden", "audit": "audit"}.get(check.rung, "ladder")


def _said(check: Check) -> str:
    return f"{check.rung} {check.subject}: {check.name} {check.detail}".strip()
