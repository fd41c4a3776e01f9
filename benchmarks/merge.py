"""The merge on every student: its error, its operators, and its latency against the branched and the plain student.

python benchmarks/merge.py --out docs/results/merge.md
"""

import argparse
import copy
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from kdexport.graph.audit import operator_counts
from kdexport.graph.export import export_onnx
from kdexport.reparam.blocks import BranchSpec, attach_branches
from kdexport.reparam.fold_student import FusedStudent, fuse_student
from kdexport.students import STUDENTS, Student
from kdexport.verify.latency import Comparison, LatencyResult, compare_latency

BRANCHES, CLASSES, SIZE, OPSET = 4, 100, 32, 20
HEADER = (
    "| student | parameters, branched | folded | operators, branched | folded | plain | whole error, float64 | "
    "fp32 error x branched | folded / branched | folded / plain |"
)


def briefly_trained(name: str, spec: BranchSpec | None) -> Student:
    """A student after a few training steps on seeded noise, so that no batch norm or branch is in its initial state."""
    torch.manual_seed(1)
    student = STUDENTS.build(name, num_classes=CLASSES, image_size=SIZE)
    if spec is not None:
        attach_branches(student, spec)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
    for _ in range(4):
        images = torch.randn(32, 3, SIZE, SIZE) + torch.randn(32, 3, 1, 1)
        loss = nn.functional.cross_entropy(student(images), (images.mean((1, 2, 3)) > 0).long())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return student.eval()


def float32_error(student: Student, fused: FusedStudent) -> float:
    """RMS error of the folded float32 student against the float64 oracle, in multiples of the branched student's."""
    images = torch.randn(128, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        exact = copy.deepcopy(student).double()(images.double())

        def distance(module: nn.Module) -> float:
            difference: Tensor = module(images).double() - exact
            return float(difference.square().mean().sqrt())

        return distance(fused.module) / distance(student)


def compare(reference: Path, candidate: Path, sessions: int) -> LatencyResult:
    """Compare the latency of two ONNX files: batch 1, one thread, interleaved, one process per session."""
    comparison = Comparison(
        reference=str(reference), candidate=str(candidate), image_size=SIZE, batch=1, threads=1, pairs=15
    )
    return compare_latency(comparison, max_slowdown=0.02, max_sessions=sessions)


def measure(name: str, folder: Path, sessions: int) -> str:
    """One row of the table."""
    spec = BranchSpec(placement="R1", num_branches=BRANCHES, layers="multi")
    student, plain = briefly_trained(name, spec), briefly_trained(name, None)
    fused = fuse_student(student)
    modules = {"branched": student, "folded": fused.module, "plain": fuse_student(plain).module}
    files = {key: folder / f"{name}-{key}.onnx" for key in modules}
    for key, module in modules.items():
        export_onnx(module, files[key], image_size=SIZE, opset=OPSET, metadata={})
    graphs = {key: operator_counts(onnx.load(str(path))) for key, path in files.items()}
    assert graphs["folded"] == graphs["plain"], "the folded graph is not the plain student's"
    branched = compare(files["branched"], files["folded"], sessions)
    same = compare(files["plain"], files["folded"], sessions)
    certificate = fused.certificate
    counts = " | ".join(str(sum(graphs[key].values())) for key in ("branched", "folded", "plain"))
    return (
        f"| {name} | {certificate.unfused_parameters:,} | {certificate.fused_parameters:,} | {counts} | "
        f"{certificate.whole_relative_error:.1e} | {float32_error(student, fused):.2f} | {_ratio(branched)} | "
        f"{_ratio(same)} |"
    )


def _ratio(result: LatencyResult) -> str:
    return f"{result.ratio:.3f} ({result.low:.3f} to {result.high:.3f})"


def page(rows: list[str], sessions: int) -> str:
    """The page with the results, as Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnx", "onnxruntime-gpu"))
    machine = f"{platform.machine()}, {torch.get_num_threads()} CPU threads, no GPU"
    return f"""# The merge on every student

`python benchmarks/merge.py --sessions {sessions}` on {machine},
Python {platform.python_version()}, {versions}.

{SIZE}x{SIZE} inputs, {CLASSES} classes, {BRANCHES} branches at every stage (R1), four training steps on noise, so no
batch norm is an identity. Latency: onnxruntime CPU with its graph optimisations on, batch 1, one thread, interleaved
pairs; ratio of medians with its 99 % interval over up to {sessions} fresh processes. The exporter also folds the batch
norms of the branched graph, but no branches. fp32 error: distance from the float64 oracle in multiples of that of the
branched float32 student (up to 2 allowed by rung B).

{HEADER}
|{"---|" * 10}
{chr(10).join(rows)}
"""


def main() -> None:
    """Measure and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name in STUDENTS.names():
            rows.append(measure(name, Path(folder), options.sessions))
            print(rows[-1], flush=True)
    text = page(rows, options.sessions)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
