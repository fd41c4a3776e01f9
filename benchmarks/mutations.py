"""Changes of a bundle, each tried, and the check that sees it.

python benchmarks/mutations.py run dist/quickstart --count 400 --out mutations.jsonl
python benchmarks/mutations.py report mutations.jsonl --out docs/results/mutations.md

Each change is tried twice: as it is, and with the digests of the changed files written into the manifest. A run that
was stopped is continued by the same command. Every change is drawn from --seed and its own name; those whose
"GROUP NAME" fits the pattern of --always are tried first and count towards --count. The exit code is 1 if a change is
seen by no check and has no reason in mutation_bench/catalogue.py, or if the signature misses one.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from mutation_bench.catalogue import Mutation, catalogue, known_reason, sample, unseen_reason
from mutation_bench.judge import JUDGES, Judge

from kdexport.bundle.manifest import hash_files
from kdexport.bundle.signature import sign_bundle

SIGNATURE = "signature"
#: What became of a change whose digests were written again, and which that undid.
UNDONE = "undone"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One change, tried; ``seen_by`` is one of ``JUDGES``, ``UNDONE`` or empty."""

    group: str
    name: str
    rehashed: bool
    seen_by: str
    fact: str
    signature: bool
    reason: str

    @property
    def unexplained(self) -> bool:
        """Whether nothing saw the change and no reason is known."""
        return not self.seen_by and not self.reason

    @property
    def wrong(self) -> bool:
        """Whether the change is unexplained, or the signature missed it."""
        return self.unexplained or not (self.signature or self.seen_by == UNDONE)


def signed_copy(bundle: Path, scratch: Path) -> tuple[Path, Path]:
    """A copy of ``bundle`` that is signed with a new key, and the public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = scratch / "key.pem", scratch / "key.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    copy = Path(shutil.copytree(bundle, scratch / "signed"))
    sign_bundle(copy, key=private)
    return copy, public


def rehash(folder: Path) -> None:
    """Write the digests of the files into the manifest, as someone who changes files on purpose does."""
    path = folder / "manifest.json"
    try:
        data = json.loads(path.read_text())
        data["files"] = hash_files(folder)
    except (ValueError, TypeError):
        return
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def attempt(mutation: Mutation, bundle: Path, judge: Judge, scratch: Path, seed: int) -> Iterator[Outcome]:
    """The change as it is, then with new digests; ``bundle`` is the signed one."""
    before, known = content(bundle), dict[str, tuple[str, str]]()
    for rehashed in (False, True):
        folder = scratch / "changed" / "bundle"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(bundle, folder)
        mutation.apply(folder, np.random.default_rng([seed, zlib.crc32(mutation.name.encode())]))
        if not rehashed and content(folder) == before and _same_bytes(folder, bundle):
            raise ValueError(f"{mutation.group} {mutation.name} changes nothing")
        if rehashed:
            rehash(folder)
        after = content(folder)
        if rehashed and after == before:
            yield Outcome(mutation.group, mutation.name, rehashed, UNDONE, "", False, "")
            continue
        # A change of the manifest alone is the same with new digests.
        key = json.dumps(after, sort_keys=True)
        seen_by, fact = known.setdefault(key, judge.first_to_see(folder)) if key not in known else known[key]
        reason = "" if seen_by else unseen_reason(mutation, bundle, folder)
        yield Outcome(mutation.group, mutation.name, rehashed, seen_by, fact, judge.signature(folder), reason)


def _same_bytes(first: Path, second: Path) -> bool:
    return (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file, the manifest as JSON, and what is not a regular file."""
    path = folder / "manifest.json"
    try:
        manifest = json.dumps(json.loads(path.read_text()), sort_keys=True)
    except (OSError, ValueError):
        manifest = repr(path.read_bytes()) if path.is_file() else ""
    others = {str(p.relative_to(folder)): "no file" for p in folder.rglob("*") if p.is_symlink() or p.is_dir()}
    return {**hash_files(folder), **others, "manifest.json": manifest}


def run(bundle: Path, count: int, seed: int, out: Path, always: str = "") -> list[Outcome]:
    """Try ``count`` changes and append each to ``out``; those that it has are not tried again.

    Changes whose "GROUP NAME" fits the pattern ``always`` come first, whatever ``seed`` draws.
    """
    torch.set_num_threads(1)
    outcomes = read(out) if out.exists() else []
    done = {(outcome.group, outcome.name) for outcome in outcomes if outcome.rehashed}
    with tempfile.TemporaryDirectory(prefix="kdexport-mutations-") as name, out.open("a", encoding="utf-8") as stream:
        scratch = Path(name)
        (scratch / "rebuilt").mkdir()
        signed, public = signed_copy(bundle, scratch)
        judge = Judge(signed, public, scratch / "rebuilt")
        every = catalogue(signed)
        first = [m for m in every if always and re.fullmatch(always, f"{m.group} {m.name}")]
        drawn = sample([m for m in every if m not in first], count - len(first), seed)
        # In another order, so that a run that is stopped has some of each group.
        np.random.default_rng(seed).shuffle(drawn)
        chosen = [*first, *drawn]
        for place, mutation in enumerate(chosen):
            if (mutation.group, mutation.name) in done:
                continue
            found = list(attempt(mutation, signed, judge, scratch, seed))
            outcomes += found
            stream.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in found)
            stream.flush()
            marks = " / ".join(outcome.seen_by or f"NOT SEEN ({outcome.reason or '?'})" for outcome in found)
            print(f"{place + 1}/{len(chosen)} {mutation.group} {mutation.name}: {marks}", flush=True)
    return outcomes


def read(path: Path) -> list[Outcome]:
    """The outcomes in a file of ``run``, with reasons that were found since; a half-written line is not one."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            outcome = Outcome(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if outcome.unexplained:
            outcome = replace(outcome, reason=known_reason(outcome.group, outcome.name))
        found.append(outcome)
    return found


def report(outcomes: list[Outcome], about: str = "") -> str:
    """The page of a run: ``about`` the bundle, who sees what, and every change that no check sees, by reason."""
    mutations = len({(outcome.group, outcome.name) for outcome in outcomes})
    tried = [outcome for outcome in outcomes if outcome.seen_by != UNDONE]
    lines = [
        "# Mutations of a bundle",
        "",
        f"{mutations} changes of one bundle, each tried as it is and again after the digests of the changed files were "
        f"written into the manifest: {len(tried)} trials. {len(outcomes) - len(tried)} more are undone by new digests. "
        "`python benchmarks/mutations.py` makes this page.",
        "",
        *([about, ""] if about else []),
        f"- The signature refuses {sum(o.signature for o in tried)} of {len(tried)}.",
        f"- Without it, {sum(bool(o.seen_by) for o in tried)} are seen by `kdexport verify`, "
        f"{sum(not o.seen_by and bool(o.reason) for o in tried)} are not, for a reason below, and "
        f"{sum(o.unexplained for o in tried)} are not, without a reason.",
        "",
        "Checks are tried in the order of the columns, and a trial counts for the first one that sees it.",
        "",
    ]
    for rehashed in (False, True):
        chosen = [outcome for outcome in tried if outcome.rehashed == rehashed]
        lines += ["## With new digests" if rehashed else "## As they are", "", *_table(chosen), ""]
    return "\n".join([*lines, *_survivors(tried)]) + "\n"


def _table(outcomes: list[Outcome]) -> Iterator[str]:
    columns = [*JUDGES, "not seen"]
    yield f"| changed | trials | {' | '.join(columns)} | {SIGNATURE} |"
    yield "|---" * (len(columns) + 3) + "|"
    for group in [*dict.fromkeys(outcome.group for outcome in outcomes), "all"]:
        rows = [outcome for outcome in outcomes if group in ("all", outcome.group)]
        counts = Counter(outcome.seen_by or "not seen" for outcome in rows)
        cells = [str(counts[column] or "") for column in columns]
        yield f"| {group} | {len(rows)} | {' | '.join(cells)} | {sum(row.signature for row in rows)} |"


def _survivors(outcomes: list[Outcome]) -> Iterator[str]:
    yield "## Seen by the signature alone"
    yield ""
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        if not outcome.seen_by:
            names = reasons.setdefault(outcome.reason or "NO REASON KNOWN", [])
            label = f"{outcome.group}: {outcome.name}"
            if label not in names:
                names.append(label)
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        yield f"**{reason[:1].upper()}{reason[1:]}** ({len(names)})"
        yield ""
        yield "; ".join(f"`{name}`" for name in names) + "."
        yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("bundle", type=Path)
    running.add_argument("--count", type=int, default=400)
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--always", default="", help='Pattern of "GROUP NAME": changes that are not left to chance.')
    running.add_argument("--out", type=Path, required=True)
    reporting = commands.add_parser("report")
    reporting.add_argument("results", type=Path)
    reporting.add_argument("--about", default="", help="A sentence on the bundle and the machine.")
    reporting.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "report":
        given.out.write_text(report(read(given.results), given.about), encoding="utf-8")
        return
    outcomes = run(given.bundle, given.count, given.seed, given.out, given.always)
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    for outcome in wrong:
        print(f"unexplained: {outcome.group} {outcome.name}, digests {'new' if outcome.rehashed else 'old'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
