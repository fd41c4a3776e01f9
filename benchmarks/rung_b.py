"""How often would rung B fail a correct fold? Error of fused over unfused float32 students, with and without a floor.

python benchmarks/rung_b.py --students 25
"""

import argparse
import copy

import numpy as np
import torch
from torch import Tensor, nn

from kdexport.reparam.blocks import BranchSpec, attach_branches
from kdexport.reparam.fuse import fuse_student
from kdexport.students import STUDENTS, Student

SPECS = (
    BranchSpec(placement="R1", num_branches=4),
    BranchSpec(placement="R2", num_branches=2, adapter_channels=64),
)


def briefly_trained(spec: BranchSpec, seed: int) -> Student:
    """A small student after four steps: batch norms and weights are no longer those of the initialisation."""
    torch.manual_seed(seed)
    student = STUDENTS.build("mobilenetv2", num_classes=3, image_size=40)
    attach_branches(student, spec)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    for _ in range(4):
        images = torch.randn(24, 3, 40, 40) + torch.randn(24, 1, 1, 1)
        loss = nn.functional.cross_entropy(student(images), (images.mean((1, 2, 3)) > 0).long())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return student.eval()


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())


def main() -> None:
    """Read the arguments and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", type=int, default=25)
    count = parser.parse_args().students
    raw, floored = [], []
    for seed in range(count):
        for spec in SPECS:
            student = briefly_trained(spec, seed)
            fused = fuse_student(student).module
            images = torch.randn(35, 3, 40, 40)
            with torch.no_grad():
                exact = copy.deepcopy(student).double()(images.double())
                own, error = rms(student(images) - exact), rms(fused(images) - exact)
            raw.append(error / own)
            floored.append(error / max(own, torch.finfo(torch.float32).eps * rms(exact)))
    print("| unit of comparison | students | median | largest | above 2 |\n|---|---|---|---|---|")
    for name, values in (("the unfused student's own error", raw), ("the same, at least one float32 unit", floored)):
        above = sum(value > 2 for value in values)
        print(f"| {name} | {len(values)} | {np.median(values):.2f} | {max(values):.2f} | {above} |")


if __name__ == "__main__":
    main()
