"""Commands that are killed, whose disk is full or read-only, that run twice at once, or whose clock jumps.

After each fault the output is absent, the old one or the new one, and whole; after a fault that left the command alive
nothing is left in the folder of temporary files. Then the same command is run again without a fault and must succeed.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from PIL import Image

from kdexport.bundle.manifest import changed_files, hash_files, read_manifest
from kdexport.bundle.signature import require_signed
from kdexport.core.digests import sha256_file
from kdexport.errors import KdexportError
from robustness_bench.cases import ROOT, Rng, pick

FAULTS = ("kill", "stop", "full disk", "read-only", "two at once", "clock")
#: The quick commands come twice, since a case takes two or three runs of its command.
COMMANDS = ("slim", "fuse", "sign", "replay", "triton", "slim", "gate", "fuse", "sign", "build")
#: Longest time of one command; a gate on a busy machine takes more sessions.
LIMIT_S = 600.0
_STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

#: In the place of a module that Python imports at the start of every process.
_JUMPS = """
import random, time

_now, _rng = time.time, random.Random(int(time.time() * 1000) % 1000)
time.time = lambda: _now() + _rng.choice([-1, 1]) * _rng.uniform(0, 3e8)
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that ended: by itself, by a signal (negative), or never (None)."""

    exit_code: int | None
    stderr: str
    seconds: float
    memory: int


@dataclass(frozen=True, slots=True)
class Task:
    """One command in a folder of its own: what it runs, where it writes, and whether its output is whole."""

    name: str
    arguments: Sequence[str]
    out: Path
    scratch: Path
    problem: Callable[[], str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self, log: Path, **added: str) -> "subprocess.Popen[bytes]":
        environment = {
            **os.environ, "TMPDIR": str(self.scratch), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
            "COLUMNS": "160", "NO_COLOR": "1", "PYTHONPATH": str(ROOT), **self.environment, **added,
        }  # fmt: skip
        command = [sys.executable, "-m", "kdexport", *self.arguments]
        with log.open("wb") as stream:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream, env=environment, cwd=ROOT)


def wait(process: "subprocess.Popen[bytes]", log: Path, started: float) -> Ended:
    """Wait for the end of a command, with its peak memory; kills it after ``LIMIT_S``."""
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() - started > LIMIT_S:
            process.kill()
            process.wait()
            return Ended(None, log.read_text(errors="replace"), LIMIT_S, 0)
        time.sleep(0.01)
    return Ended(
        process.returncode, log.read_text(errors="replace"), time.monotonic() - started, usage.ru_maxrss * 1024
    )


def run(task: Task, log: Path, **added: str) -> Ended:
    """Run the command to its end."""
    started = time.monotonic()
    return wait(task.start(log, **added), log, started)


@dataclass(frozen=True, slots=True)
class Material:
    """What the commands work on, and how long each takes without a fault."""

    bundle: Path
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def made(cls, bundle: Path, folder: Path) -> "Material":
        """Write a pair of keys into ``folder``, which is empty."""
        key = ec.generate_private_key(ec.SECP256R1())
        (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / "key.pub.pem").write_bytes(public)
        return cls(bundle, folder)

    def task(self, name: str, place: Path) -> Task:
        """The command ``name``, with its output and its temporary files below ``place``."""
        scratch, home = place / "tmp", place / "home"
        for folder in (scratch, home):
            folder.mkdir(parents=True, exist_ok=True)
        out = place / "disk" / "out"
        out.parent.mkdir(exist_ok=True)
        if name == "slim":
            words = ["slim", str(self.bundle), "--target", "onnx-fp32", "--out", str(out)]
            return Task(name, words, out, scratch, lambda: bundle_problem(out))
        if name == "fuse":
            self._require_program()
            words = ["fuse", str(self.folder / "program.pt2"), "--out", str(out)]
            return Task(name, words, out, scratch, lambda: fused_problem(out))
        if name == "replay":
            words = ["replay", str(self.bundle), "--out", str(out)]
            return Task(name, words, out, scratch, lambda: replayed_problem(out))
        if name == "triton":
            words = ["triton", str(self.bundle), "--repository", str(out), "--name", "student"]
            return Task(name, words, out, scratch, lambda: repository_problem(out, self.bundle))
        if name == "gate":
            # Inconclusive is an honest end on a busy machine.
            words = ["gate", str(self.bundle), "--on-inconclusive", "warn", "--junit", str(out)]
            return Task(name, words, out, scratch, lambda: junit_problem(out))
        if name == "build":
            self._require_photos()
            words = ["build", "--student", str(self.folder / "network.pt2"), "--data", str(self.folder / "photos")]
            words += ["--target", "onnx-fp32", "--workspace", str(home / "workspace"), "--out", str(out)]
            return Task(name, words, out, scratch, lambda: bundle_problem(out))
        shutil.copytree(self.bundle, out, dirs_exist_ok=True)
        words = ["sign", str(out), "--key", str(self.folder / "key.pem")]
        return Task(name, words, out, scratch, lambda: signed_problem(out, self.folder / "key.pub.pem"))

    def _require_program(self) -> None:
        """Write the program to fuse, once; importing torch takes longer than most cases."""
        path = self.folder / "program.pt2"
        if path.is_file():
            return
        import torch

        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        torch.export.save(torch.export.export(network, (torch.randn(1, 3, 8, 8),)), path)

    def _require_photos(self) -> None:
        """Write a data set of two classes and a network for them, so that a build trains nothing, once."""
        if (self.folder / "network.pt2").is_file():
            return
        rng = np.random.default_rng(0)
        for split, count in (("train", 12), ("test", 8)):
            for label in ("dark", "light"):
                folder = self.folder / "photos" / split / label
                folder.mkdir(parents=True)
                for number in range(count):
                    low = 0 if label == "dark" else 128
                    pixels = rng.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.png")
        import torch

        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU()]
        head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 2)]
        network = torch.nn.Sequential(*layers, *head).eval()
        batch = torch.export.Dim("batch")
        example = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
        torch.export.save(program, self.folder / "network.pt2")


def bundle_problem(folder: Path) -> str:
    """What is wrong with a bundle; empty if it is whole."""
    try:
        changed = changed_files(folder, read_manifest(folder).files)
    except KdexportError as error:
        return error.message
    return f"files differ: {sorted(changed)[:3]}" if changed else ""


def fused_problem(folder: Path) -> str:
    """What is wrong with a result of ``fuse``."""
    try:
        listed = json.loads((folder / "certificate.json").read_text())["files"]
        return next((name for name, digest in listed.items() if sha256_file(folder / name) != digest), "")
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


def replayed_problem(folder: Path) -> str:
    """What is wrong with the files that ``replay`` wrote."""
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    return "" if {"student.safetensors", "model.onnx"} <= names else f"it has only {sorted(names)}"


def repository_problem(repository: Path, bundle: Path) -> str:
    """What is wrong with a Triton repository of one model: each version has the graph of the bundle."""
    if not (model := repository / "student").is_dir():
        return ""
    graph = sha256_file(bundle / "targets" / "onnx-fp32" / "model.onnx")
    versions = [path for path in model.iterdir() if path.name.isdecimal()]
    wrong = [path.name for path in versions if sha256_file(path / "model.onnx") != graph]
    if wrong:
        return f"other graphs in the versions {wrong}"
    names = sorted(path.name for path in model.iterdir())
    return "" if versions and "config.pbtxt" in names else f"it has only {names}"


def junit_problem(path: Path) -> str:
    """What is wrong with a file of JUnit XML."""
    try:
        return "" if ElementTree.parse(path).getroot().tag in ("testsuites", "testsuite") else "another XML"
    except (OSError, ElementTree.ParseError) as error:
        return f"{type(error).__name__}: {error}"


def signed_problem(folder: Path, key: Path) -> str:
    """What is wrong with a signed bundle."""
    try:
        require_signed(folder, key)
    except KdexportError as error:
        return error.message
    return ""


def attempt(index: int, seed: int, material: Material, place: Path) -> dict[str, Any]:
    """One fault in one command, and the same command again without it."""
    rng = np.random.default_rng([seed, index])
    fault, name = FAULTS[index % len(FAULTS)], COMMANDS[(index // len(FAULTS)) % len(COMMANDS)]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    log = place / "stderr"
    result = {"index": index, "kind": fault, "reader": name, "exit_code": None, "seconds": 0.0, "memory_mib": 0}
    with _prepared(fault, material, name, place, rng) as task:
        if task is None:
            return {**result, "wrong": "", "said": "not run: this process may not mount a file system", "ran": False}
        old = rng.random() < 0.5 and name in ("slim", "fuse") and fault in ("kill", "stop")
        if old:
            run(task, log)
        ended, wrong = _INJECT[fault](task, material, log, rng)
        wrong = wrong or _state(task, ended, fault, old=old)
        said = ended.stderr[-300:]
    if not wrong:
        # The fault is over: a disk of its own is gone with what was on it.
        healthy = material.task(name, place)
        if name == "replay" and healthy.out.exists():
            # It was whole, or it would be wrong by now; replay writes into new folders only.
            shutil.rmtree(healthy.out)
        again = run(healthy, log)
        wrong = "" if again.exit_code == 0 else f"again: exit code {again.exit_code}: {again.stderr[-300:]}"
        wrong = wrong or (f"again: {healthy.problem()}" if healthy.problem() else "")
        left = [path.name for path in healthy.out.parent.iterdir() if path.name != healthy.out.name]
        wrong = wrong or (f"left behind: {left}" if left else "")
    return {
        **result,
        "exit_code": ended.exit_code,
        "seconds": round(ended.seconds, 2),
        "memory_mib": ended.memory // 2**20,
        "wrong": wrong,
        "said": said,
        "ran": True,
    }


@contextlib.contextmanager
def _prepared(fault: str, material: Material, name: str, place: Path, rng: Rng) -> Iterator[Task | None]:
    """The task, for a full or read-only disk on a small file system of its own; None if none can be mounted."""
    if fault not in ("full disk", "read-only"):
        yield material.task(name, place)
        return
    disk = place / ("disk" if rng.random() < 0.6 or name == "sign" else "tmp")
    disk.mkdir()
    size = sum(path.stat().st_size for path in material.bundle.rglob("*") if path.is_file())
    least = size + 65_536 if name == "sign" else 16_384
    room = int(rng.integers(least, least + size)) if fault == "full disk" else 4 * size + 2**20
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        yield None
        return
    try:
        task = material.task(name, place)
        if fault == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        elif name == "sign":
            # The signature is small: the rest of the disk is taken.
            _fill(disk)
        yield task
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _fill(disk: Path) -> None:
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(max(0, free - 4096)))


def _state(task: Task, ended: Ended, fault: str, *, old: bool) -> str:
    """What is wrong after the fault; empty if nothing is."""
    if ended.exit_code is None:
        return f"hang: over {LIMIT_S:.0f} s"
    for word in ("Traceback", "KDX900"):
        if word in ended.stderr:
            return f"{word}: {ended.stderr[-300:]}"
    if fault != "kill":
        # A cache of torch's own, which later processes use again.
        left = [path.name for path in task.scratch.iterdir() if not path.name.startswith("torchinductor_")]
        if left:
            return f"temporary files are left: {left}"
    if task.name == "sign":
        return ""
    there = task.out.exists()
    if old and not there and fault != "kill":
        return "the old output is gone"
    problem = task.problem() if there else ""
    return f"the output is not whole: {problem}" if problem else ""


def _kill(task: Task, material: Material, log: Path, rng: Rng) -> tuple[Ended, str]:
    return _interrupted(task, material, log, rng, signal.SIGKILL)


def _stop(task: Task, material: Material, log: Path, rng: Rng) -> tuple[Ended, str]:
    number: signal.Signals = pick(rng, tuple(_STOPS))
    ended, _ = _interrupted(task, material, log, rng, number)
    # A command may have ended before the signal, and Python itself ends by it before our code runs.
    expected = (0, _STOPS[number], -number)
    return ended, "" if ended.exit_code in expected else f"exit code {ended.exit_code} after {number.name}"


def _interrupted(task: Task, material: Material, log: Path, rng: Rng, number: signal.Signals) -> tuple[Ended, str]:
    usual = _usual_seconds(task, material, log)
    started = time.monotonic()
    process = task.start(log)
    until = started + usual * float(rng.uniform(0.05, 1.05))
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.005)
    if process.poll() is not None:
        return Ended(process.returncode, log.read_text(errors="replace"), time.monotonic() - started, 0), ""
    process.send_signal(number)
    return wait(process, log, started), ""


def _usual_seconds(task: Task, material: Material, log: Path) -> float:
    """Seconds of the command without a fault, measured at its first use in another folder."""
    if task.name not in material.seconds:
        place = material.folder / f"usual-{task.name}"
        other = material.task(task.name, place)
        material.seconds[task.name] = run(other, log).seconds
        shutil.rmtree(place)
    return material.seconds[task.name]


def _disk(task: Task, _material: Material, log: Path, _rng: Rng) -> tuple[Ended, str]:
    ended = run(task, log)
    if ended.exit_code == 0:
        return ended, ""
    if ended.exit_code not in (2, 4):
        return ended, f"exit code {ended.exit_code}: {ended.stderr[-300:]}"
    named = str(task.out.parent) in ended.stderr or str(task.scratch) in ended.stderr
    return ended, "" if named else f"the place is not named: {ended.stderr[-300:]}"


def _twice(task: Task, _material: Material, log: Path, rng: Rng) -> tuple[Ended, str]:
    other = log.with_name("stderr-2")
    started = time.monotonic()
    first = task.start(log)
    time.sleep(float(rng.uniform(0, 1)))
    second = task.start(other)
    ended, also = wait(first, log, started), wait(second, other, started)
    # replay writes into an empty folder only, so that the later one may be refused.
    allowed = {0, 2} if task.name == "replay" else {0}
    if not {ended.exit_code, also.exit_code} <= allowed or 0 not in (ended.exit_code, also.exit_code):
        return ended, f"exit codes {ended.exit_code}, {also.exit_code}: {(ended.stderr + also.stderr)[-400:]}"
    return ended, ""


def _clock(task: Task, material: Material, log: Path, rng: Rng) -> tuple[Ended, str]:
    folder = log.with_name("clock")
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_JUMPS)
    for path in (*material.folder.glob("*.p*"), *task.out.parent.rglob("*")):
        moment = time.time() + float(rng.uniform(-3e8, 3e8))
        os.utime(path, (moment, moment))
    ended = run(task, log, PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]))
    return ended, "" if ended.exit_code == 0 else f"exit code {ended.exit_code}: {ended.stderr[-300:]}"


_INJECT: dict[str, Callable[[Task, Material, Path, Rng], tuple[Ended, str]]] = {
    "kill": _kill,
    "stop": _stop,
    "full disk": _disk,
    "read-only": _disk,
    "two at once": _twice,
    "clock": _clock,
}


def run_faults(bundle: Path, scratch: Path, seed: int, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The result of each case, in order; the bundle itself must never change."""
    folder = scratch / "material"
    folder.mkdir(parents=True, exist_ok=True)
    material = Material.made(bundle, folder)
    before = hash_files(bundle)
    for index in indices:
        result = attempt(index, seed, material, scratch / "case")
        if hash_files(bundle) != before:
            result["wrong"] = "outside: the bundle was changed"
        yield result
