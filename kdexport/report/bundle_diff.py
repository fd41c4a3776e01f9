"""What differs between two bundles: verdicts, targets, accuracy on the same images, classes, policy, origin, files."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdexport.bundle.layout import GOLDEN, GOLDEN_LOGITS
from kdexport.bundle.manifest import Manifest, read_manifest, require_unchanged
from kdexport.core.tables import Table
from kdexport.data.preprocessing import differing_fields
from kdexport.report.check_tables import beyond_checks, failed_checks, verdict_sentence
from kdexport.report.contents import Evidence, TargetFacts, stored_evidence, target_facts
from kdexport.stats.paired import estimate_drop
from kdexport.stats.proportions import ACCURACY_CONFIDENCE, Estimate
from kdexport.verify.policy import Change, policy_changes, stored_policy

#: Names that one row lists.
_LISTED = 8
ABSENT = "absent"
_ACCURACIES = ("metrics.top1", "metrics.teacher_top1")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedAccuracy:
    """The predictions of one target in both bundles on the same ``images``: how many differ, and the loss of top-1 from
    A to B with one-sided 95 % bounds.
    """

    images: int
    flips: int
    lost: int
    gained: int
    drop: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetPair:
    """A target in A and in B; None where a bundle lacks it. ``paired`` is None without the same images."""

    name: str
    a: TargetFacts | None
    b: TargetFacts | None
    paired: PairedAccuracy | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of the two bundles."""

    folder: str
    verdict: str
    passes: bool
    build_key: str
    student: str
    kdexport: str
    measured: str
    machine: Mapping[str, Any]
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleDiff:
    """Two bundles beside each other. Values that are equal in both are in neither of the mappings."""

    a: Side
    b: Side
    targets: tuple[TargetPair, ...]
    same_images: bool
    classes_added: tuple[str, ...]
    classes_removed: tuple[str, ...]
    classes_reordered: bool
    preprocessing: Mapping[str, tuple[Any, Any]]
    policy: tuple[Change, ...]
    origin: Mapping[str, tuple[Any, Any]]
    versions: Mapping[str, tuple[Any, Any]]
    files: Mapping[str, str]

    @property
    def same(self) -> bool:
        """Whether every file is the same."""
        return not self.files

    def to_json(self) -> dict[str, Any]:
        """A JSON object; pairs are [A, B]."""
        return {
            "same": self.same,
            "a": asdict(self.a),
            "b": asdict(self.b),
            "same_images": self.same_images,
            "targets": [asdict(pair) for pair in self.targets],
            "classes": {
                "added": self.classes_added,
                "removed": self.classes_removed,
                "reordered": self.classes_reordered,
            },
            "preprocessing": self.preprocessing,
            "policy": [asdict(change) for change in self.policy],
            "origin": self.origin,
            "versions": self.versions,
            "files": self.files,
        }


def diff_bundles(a: Path, b: Path) -> BundleDiff:
    """Compare two bundle folders.

    Raises ``BundleError`` for a folder that is not a bundle, and ``VerificationError`` for one whose files differ from
    its manifest.
    """
    sides = [read_manifest(folder) for folder in (a, b)]
    for folder, manifest in zip((a, b), sides, strict=True):
        require_unchanged(folder, manifest)
    evidence = [stored_evidence(folder, manifest) for folder, manifest in zip((a, b), sides, strict=True)]
    return compare(_side(a, sides[0], evidence[0]), sides[0], evidence[0], _side(b, sides[1], evidence[1]), sides[1],
                   evidence[1])  # fmt: skip


def compare(a: Side, old: Manifest, evidence_a: Evidence, b: Side, new: Manifest, evidence_b: Evidence) -> BundleDiff:
    """The difference of two manifests with what their bundles store."""
    same_images = _same_images(old, evidence_a, new, evidence_b)
    classes, others = old.spec.classes, new.spec.classes
    one, two = old.spec.preprocessing, new.spec.preprocessing
    return BundleDiff(
        a=a,
        b=b,
        targets=tuple(_target_pairs(old, evidence_a, new, evidence_b, same_images)),
        same_images=same_images,
        classes_added=tuple(name for name in others if name not in set(classes)),
        classes_removed=tuple(name for name in classes if name not in set(others)),
        classes_reordered=classes != others and sorted(classes) == sorted(others),
        preprocessing={name: (getattr(one, name), getattr(two, name)) for name in differing_fields(one, two)},
        policy=policy_changes(stored_policy(old.data), stored_policy(new.data)),
        origin=_changes(_origin(old), _origin(new)),
        versions=_changes(old.data["versions"], new.data["versions"]),
        files=_changed_files(old.files, new.files),
    )


def _side(folder: Path, manifest: Manifest, evidence: Evidence) -> Side:
    data = manifest.data
    times = data.get("target_times") or {}
    return Side(
        folder=str(folder),
        verdict=verdict_sentence(data),
        passes=not failed_checks(data) and not beyond_checks(data),
        build_key=manifest.build_key,
        student=manifest.spec.student,
        kdexport=str(data.get("kdexport", "")),
        measured=str(times.get("measured", "")),
        machine=dict(times.get("machine", {})),
        bytes=sum(evidence.sizes.values()),
    )


def _same_images(old: Manifest, evidence_a: Evidence, new: Manifest, evidence_b: Evidence) -> bool:
    """Whether both bundles have answers to the same images with the same labels."""
    one, two = evidence_a.record, evidence_b.record
    split = (old.data.get("task") or {}).get("data_sha256")
    if one is None or two is None or not split or split != (new.data.get("task") or {}).get("data_sha256"):
        return False
    return np.array_equal(one.reference.indices, two.reference.indices) and old.spec.classes == new.spec.classes


def _target_pairs(
    old: Manifest, evidence_a: Evidence, new: Manifest, evidence_b: Evidence, same_images: bool
) -> Iterator[TargetPair]:
    one = {facts.name: facts for facts in target_facts(old.data, evidence_a)}
    two = {facts.name: facts for facts in target_facts(new.data, evidence_b)}
    for name in dict.fromkeys((*one, *two)):
        a, b = one.get(name), two.get(name)
        paired = _paired(a, evidence_a, b, evidence_b) if a and b and same_images else None
        yield TargetPair(name=name, a=a, b=b, paired=paired)


def _paired(a: TargetFacts, evidence_a: Evidence, b: TargetFacts, evidence_b: Evidence) -> PairedAccuracy | None:
    one, two = evidence_a.record, evidence_b.record
    if one is None or two is None or a.results not in one.files or b.results not in two.files:
        return None
    before, after = one.files[a.results].predictions, two.files[b.results].predictions
    labels = one.reference.labels
    lost = int(((before == labels) & (after != labels)).sum())
    gained = int(((before != labels) & (after == labels)).sum())
    return PairedAccuracy(
        images=len(labels),
        flips=int((before != after).sum()),
        lost=lost,
        gained=gained,
        drop=estimate_drop(lost, gained, len(labels), ACCURACY_CONFIDENCE),
    )


def _origin(manifest: Manifest) -> dict[str, Any]:
    """Where a student comes from, by path; of the measurements of its training only the accuracies."""
    found = dict(_flat(manifest.data["provenance"]))
    return {name: value for name, value in found.items() if name.startswith("metrics.") <= (name in _ACCURACIES)}


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested tables by their path; lists are values."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{place}.{key}" if place else str(key))
    else:
        yield place, value


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = sorted({*old, *new})
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    words: dict[str, Callable[[str], bool]] = {
        "only in A": lambda name: name not in new,
        "only in B": lambda name: name not in old,
        "changed": lambda name: name in old and name in new and old[name] != new[name],
    }
    return {name: word for word, applies in words.items() for name in sorted({*old, *new}) if applies(name)}


def diff_tables(diff: BundleDiff) -> list[Table]:
    """The difference as tables for a terminal or a page; one without differences is left out."""
    found = [_summary(diff), _target_table(diff), _accuracy(diff), _what_changed(diff), _files(diff)]
    return [table for table in found if table.rows]


def _summary(diff: BundleDiff) -> Table:
    a, b = diff.a, diff.b
    rows = [
        ("folder", a.folder, b.folder),
        ("verdict at its build", a.verdict, b.verdict),
        ("student", a.student, b.student),
        ("build key", a.build_key[:12], b.build_key[:12]),
        ("size of all files", _megabytes(a.bytes), _megabytes(b.bytes)),
        ("latency measured", a.measured or "not recorded", b.measured or "not recorded"),
    ]
    return Table(title="Bundles", header=("", "A", "B"), rows=tuple(rows))


def _target_table(diff: BundleDiff) -> Table:
    rows = []
    for pair in diff.targets:
        sides = (pair.a, pair.b)
        rows.append(
            (
                pair.name,
                _both(sides, lambda facts: "not recorded" if facts.bytes is None else _megabytes(facts.bytes)),
                _both(sides, _latency),
                _both(sides, lambda facts: "not recorded" if facts.top1 is None else f"{facts.top1.value:.2%}"),
                _both(sides, lambda facts: facts.status),
            )
        )
    note = (
        "A, then B. Latencies of other machines or days do not compare: kdexport gate B --baseline A times both."
        if any(pair.a and pair.b and pair.a.latency and pair.b.latency for pair in diff.targets)
        else "A, then B."
    )
    return Table(title="Targets", header=("target", "size", "latency", "top-1", "status"), rows=tuple(rows), note=note)


def _both(sides: tuple[TargetFacts | None, TargetFacts | None], shown: Callable[[TargetFacts], str]) -> str:
    one, two = (ABSENT if facts is None else shown(facts) for facts in sides)
    return one if one == two else f"{one} -> {two}"


def _latency(facts: TargetFacts) -> str:
    return "not recorded" if facts.latency is None else f"{facts.latency['ms']:.3f} ms"


def _accuracy(diff: BundleDiff) -> Table:
    rows = []
    for pair in diff.targets:
        if pair.paired is not None:
            found = pair.paired
            interval = f"{found.drop.low:.2%} to {found.drop.high:.2%}"
            rows.append(
                (pair.name, f"{found.flips:,} of {found.images:,}", f"{found.drop.value:.2%}", interval,
                 f"{found.lost:,}, {found.gained:,}")
            )  # fmt: skip
    header = ("target", "other answers", "top-1 lost from A to B", "bounds at 95 %", "lost, gained")
    return Table(title="The same images in both", header=header, rows=tuple(rows))


def _what_changed(diff: BundleDiff) -> Table:
    rows = []
    if not diff.same_images:
        rows.append(("validation images", "different or not recorded: accuracy is not paired", ""))
    if diff.classes_removed or diff.classes_added:
        removed, added = _listed(diff.classes_removed), _listed(diff.classes_added)
        rows.append(("classes", f"only in A: {removed}", f"only in B: {added}"))
    if diff.classes_reordered:
        rows.append(("classes", "the same", "in another order"))
    if diff.a.machine and diff.b.machine and diff.a.machine != diff.b.machine:
        rows += [
            (f"machine: {name}", _value(old), _value(new))
            for name, (old, new) in _changes(diff.a.machine, diff.b.machine).items()
        ]
    for kind, changes in (("preprocessing", diff.preprocessing), ("origin", diff.origin), ("version", diff.versions)):
        rows += [(f"{kind}: {name}", _value(old), _value(new)) for name, (old, new) in changes.items()]
    for change in diff.policy:
        word = "looser" if change.loosens else "stricter"
        rows.append((f"policy: {change.key}", f"{change.old}", f"{change.new} ({word})"))
    return Table(title="Changed", header=("what", "A", "B"), rows=tuple(rows))


def _files(diff: BundleDiff) -> Table:
    counts = Counter(word for name, word in diff.files.items() if _is_image(name))
    rows = [(name, word) for name, word in diff.files.items() if not _is_image(name)]
    rows += [(f"{GOLDEN}: {count} images", word) for word, count in counts.items()]
    return Table(title="Files", header=("file", "what"), rows=tuple(rows))


def _is_image(name: str) -> bool:
    return name.startswith(f"{GOLDEN}/") and name != GOLDEN_LOGITS


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "none") + more


def _value(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]
    return ABSENT if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
