"""Which check sees a change of a bundle: the cheap ones first, then a whole verification."""

import contextlib
import hashlib
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
    onnx_files,
    read_manifest,
    target_of,
)
from kdexport.bundle.signature import require_signed
from kdexport.core.digests import sha256_file
from kdexport.errors import BundleError, KdexportError, SignatureError
from kdexport.graph.equality import graph_difference
from kdexport.graph.plan import PLAIN
from kdexport.verify import verdict
from kdexport.verify.check import Check
from kdexport.verify.consistency import check_consistency
from kdexport.verify.rebuilt_graphs import RebuiltGraphs
from kdexport.verify.student_checks import BundleContext, check_integrity, student_checks, weight_bits
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
        self._exported: dict[str, bytes] = {}
        self._students: dict[str, tuple[list[Check], BundleContext | None]] = {}
        with self._remembering():
            rebuilt = RebuiltGraphs(bundle, manifest, scratch)
            self._sources = self._read_by_rebuilding(bundle, manifest)
            self._expected: dict[str, ModelProto] = {}
            for name, form in onnx_files(manifest).items():
                plan = layer_plans(manifest).get(str(target_of(name)), PLAIN)
                self._expected[name] = onnx.load(str(rebuilt.rebuild(name, form, plan, weight_bits(manifest))))
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
        """Fold, reference and export of the student once for the same inputs: they are most of a verification."""
        export = RebuiltGraphs._exported

        def exported(graphs: RebuiltGraphs) -> Path:
            folder, manifest, scratch = graphs._folder, graphs._manifest, graphs._scratch
            described = [manifest.data["student"], manifest.data["provenance"], manifest.opset]
            key = _key([folder / "unfused.safetensors", folder / "student.safetensors"], described)
            if key not in self._exported:
                self._exported[key] = export(graphs).read_bytes()
            path = scratch / "model.onnx"
            path.write_bytes(self._exported[key])
            return path

        def checked(folder: Path, manifest: Manifest, pixels: Any) -> tuple[list[Check], BundleContext | None]:
            read = [manifest.data.get(name) for name in ("student", "provenance", "export", "targets", "policy")]
            images = hashlib.sha256(pixels.tobytes()).hexdigest()
            key = _key([folder / "unfused.safetensors", folder / "student.safetensors"], [*read, images])
            if key not in self._students:
                self._students[key] = student_checks(folder, manifest, pixels)
            checks, context = self._students[key]
            return list(checks), None if context is None else replace(context, folder=folder, manifest=manifest)

        with (
            mock.patch.object(RebuiltGraphs, "_exported", exported),
            mock.patch.object(verdict, "student_checks", checked),
        ):
            yield


def _key(files: list[Path], described: list[Any]) -> str:
    return json.dumps([*(sha256_file(path) for path in files), described], sort_keys=True)


def _judge_of(check: Check) -> str:
    if check.name == "graph as rebuilt":
        return "graph as rebuilt"
    return {"files": "consistency", "golden": "golden", "audit": "audit"}.get(check.rung, "ladder")


def _said(check: Check) -> str:
    return f"{check.rung} {check.subject}: {check.name} {check.detail}".strip()
