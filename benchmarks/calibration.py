"""Top-1 and flips of a student in int8 by each method of calibration, and which of them ``auto`` takes.

python benchmarks/calibration.py --checkpoint DIR --data digits|folder:DIR
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from int8_answers import answers_of
from numpy.typing import NDArray

from kdexport.checkpoint import load_student, open_checkpoint
from kdexport.core.files import scratch_folder
from kdexport.data.datasets import dataset_spec, open_dataset, spread
from kdexport.graph.calibration_choice import COMPARED, choose_ranges, name_of
from kdexport.graph.export import export_onnx
from kdexport.graph.quantize import FORMS, quantize
from kdexport.graph.tensor_ranges import observe, ranges_of, write_ranges
from kdexport.reparam.fold_student import fuse_student
from kdexport.stats.paired import estimate_drop

_BATCH = 16


def main() -> None:
    """Print a row for each form of int8 and method."""
    asked = _arguments()
    trained = open_checkpoint(asked.checkpoint)
    data, preprocessing = dataset_spec(asked.data, ""), trained.spec.preprocessing
    train, test = open_dataset(data, "train"), open_dataset(data, "test")
    chosen, judged = spread(len(train), asked.images), spread(len(test), asked.test_images)
    labels = test.labels[judged]

    def calibration() -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(chosen), _BATCH):
            yield preprocessing.normalise(train.read(chosen[start : start + _BATCH], preprocessing))

    def answers(path: Path, form: str) -> NDArray[np.int64]:
        return answers_of(path, form, test, judged, preprocessing)

    with scratch_folder("calibration") as place:
        plain, ranges, path = place / "plain.onnx", place / "ranges.json", place / "int8.onnx"
        module = fuse_student(load_student(trained)).module
        export_onnx(module, plain, image_size=preprocessing.image_size, opset=20, metadata={})
        exact = answers(plain, "fp32")
        print(f"fp32 {np.mean(exact == labels):.2%} of {len(labels)} images")
        print("| form | method | divergence | top-1 | flips | top-1 lost (95 %) |\n|---|---|---|---|---|---|")
        observed = observe(plain, calibration())
        for form in FORMS:
            bits = asked.weight_bits if form == "int8-u8" else 8
            auto = choose_ranges(plain, calibration, ranges, form=form, weight_bits=bits)
            for method, percentile in COMPARED:
                name = name_of(method, percentile)
                write_ranges(ranges_of(observed, method, percentile), ranges)
                quantize(plain, ranges, path, form=form, weight_bits=bits)
                taken = " (auto)" if name == name_of(auto.method, auto.percentile) else ""
                row = _row(exact, answers(path, form), labels)
                print(f"| {form} | {name}{taken} | {auto.divergence[name]:.3f} | {row} |", flush=True)


def _row(exact: NDArray[np.int64], found: NDArray[np.int64], labels: NDArray[np.int64]) -> str:
    was, now = exact == labels, found == labels
    drop = estimate_drop(int((was & ~now).sum()), int((now & ~was).sum()), len(labels), 0.95)
    lost = f"{100 * drop.value:.1f} points ({100 * drop.low:.1f} to {100 * drop.high:.1f})"
    return f"{np.mean(now):.2%} | {np.mean(exact != found):.2%} | {lost}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--weight-bits", type=int, choices=(7, 8), default=7, help="of int8-u8")
    parser.add_argument("--images", type=int, default=256, help="for the calibration")
    parser.add_argument("--test-images", type=int, default=10_000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
