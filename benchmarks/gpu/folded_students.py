"""Folded against unfolded students on a GPU: errors in each precision, and latency, both as CUDA graphs.

python benchmarks/gpu/folded_students.py [--students mobilenetv2:32,...] [--batches 1,8,64] [--pairs 12]
                                         [--out FILE.jsonl]

Errors are those of the logits from a float64 run of the unfolded student: root mean square and largest, as parts of
those of the logits, and images whose class differs. Latencies are medians of a block of replays; each pair has one
block of both forms in random order, and the ratio is the geometric mean over pairs with its standard deviation.
"""

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.reparam.blocks import BranchSpec, attach_branches
from kdexport.reparam.fold_student import fuse_student
from kdexport.students import STUDENTS

CLASSES, BRANCHES, REPLAYS = 100, 4, 20
#: Data type, and whether TF32 is allowed.
PRECISIONS = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
}


def branched(name: str, size: int) -> nn.Module:
    """A student with branches at every layer that can have them, whose batch norms are unlike fresh ones."""
    torch.manual_seed(0)
    student = STUDENTS.build(name, num_classes=CLASSES, image_size=size)
    layers = tuple(host.tap for host in student.hosts)
    attach_branches(student, BranchSpec(placement="R1", num_branches=BRANCHES, adapter_channels=None, layers=layers))
    for module in student.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return student.eval()


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def on_gpu(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(network).to("cuda", dtype).to(memory_format=torch.channels_last)


@torch.inference_mode()
def logits(network: nn.Module, images: Tensor, precision: str) -> Tensor:
    dtype, allowed = (torch.float64, False) if precision == "exact" else PRECISIONS[precision]
    with tf32(allowed):
        given = images.to("cuda", dtype).contiguous(memory_format=torch.channels_last)
        found: Tensor = on_gpu(network, dtype)(given)
        return found.double().cpu()


def errors(found: Tensor, exact: Tensor) -> dict[str, float]:
    off = found - exact
    return {
        "rms": float(off.square().mean().sqrt() / exact.square().mean().sqrt()),
        "largest": float(off.abs().max() / exact.abs().max()),
        "other_class": int((found.argmax(1) != exact.argmax(1)).sum()),
        "images": len(exact),
    }


class Replayed:
    """A network on a batch as a CUDA graph on ``stream``."""

    def __init__(self, network: nn.Module, images: Tensor, precision: str, stream: torch.cuda.Stream) -> None:
        dtype, allowed = PRECISIONS[precision]
        self._network, self._stream = on_gpu(network, dtype), stream
        self._images = images.to("cuda", dtype).contiguous(memory_format=torch.channels_last)
        self._graph = torch.cuda.CUDAGraph()
        with tf32(allowed), torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._network(self._images)
            stream.synchronize()
            with torch.cuda.graph(self._graph, stream=stream):
                self._logits = self._network(self._images)

    def microseconds(self) -> float:
        """The median time of a replay in a block of them."""
        events = [
            [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            for _ in range(REPLAYS)
        ]
        with torch.cuda.stream(self._stream):
            for begin, end in events:
                begin.record(self._stream)
                self._graph.replay()
                end.record(self._stream)
        self._stream.synchronize()
        return 1e3 * float(np.median([begin.elapsed_time(end) for begin, end in events]))


def latency(unfolded: nn.Module, folded: nn.Module, images: Tensor, precision: str, pairs: int) -> dict[str, float]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    arms = [Replayed(network, images, precision, stream) for network in (unfolded, folded)]
    rng, rows = np.random.default_rng(0), []
    for arm in arms:
        arm.microseconds()
    for _ in range(pairs):
        row = [0.0, 0.0]
        for index in rng.permutation(2):
            row[index] = arms[index].microseconds()
        rows.append(row)
    times = np.array(rows)
    ratios = np.log(np.maximum(times[:, 1], 1e-9) / np.maximum(times[:, 0], 1e-9))
    return {
        "unfolded_us": round(float(np.median(times[:, 0])), 2),
        "folded_us": round(float(np.median(times[:, 1])), 2),
        "ratio": round(float(np.exp(ratios.mean())), 4),
        "deviation": round(float(ratios.std(ddof=1)), 4),
    }


def lines(student: str, batches: list[int], pairs: int) -> Iterator[dict[str, object]]:
    name, _, side = student.partition(":")
    unfolded = branched(name, int(side))
    folded = fuse_student(unfolded).module.eval()
    images = torch.randn(256 if int(side) <= 64 else 32, 3, int(side), int(side))
    exact = logits(unfolded, images, "exact")
    yield {
        "student": student,
        "precision": "float64",
        "form": "folded",
        **errors(logits(folded, images, "exact"), exact),
    }
    for precision in PRECISIONS:
        for form, network in (("unfolded", unfolded), ("folded", folded)):
            found = errors(logits(network, images, precision), exact)
            yield {"student": student, "precision": precision, "form": form, **found}
    for precision in ("fp32", "fp16", "bf16"):
        for batch in batches:
            found = latency(unfolded, folded, images[:batch], precision, pairs)
            yield {"student": student, "precision": precision, "batch": min(batch, len(images)), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", default="mobilenetv2:32,shufflenetv1:32,resnet18:32,mobilenetv2:224")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device.")
    torch.backends.cudnn.benchmark = True
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for student in options.students.split(","):
        for line in lines(student, [int(batch) for batch in options.batches.split(",")], options.pairs):
            print(json.dumps({**line, **facts}), flush=True)
            if options.out:
                with options.out.open("a") as stream:
                    stream.write(json.dumps({**line, **facts}) + "\n")


if __name__ == "__main__":
    main()
