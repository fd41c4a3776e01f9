"""Top-1 in float32, after calibration and after quantize-aware training, of one student on the same images.

python benchmarks/quantize_aware.py --checkpoint DIR --data digits|folder:DIR --epochs 1 --learning-rate 1e-3
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import torch
from int8_answers import answers_of
from numpy.typing import NDArray

from kdexport.backends.base import INPUT
from kdexport.checkpoint import load_student, load_tensors, open_checkpoint
from kdexport.core.files import scratch_folder
from kdexport.data.datasets import dataset_spec, open_dataset, spread
from kdexport.graph.calibration_choice import choose_ranges
from kdexport.graph.equalise import equalise
from kdexport.graph.export import export_onnx
from kdexport.graph.quantize import FORMS, parse_form, quantize
from kdexport.graph.tensor_ranges import METHODS, calibrate
from kdexport.graph.trained_weights import with_weights
from kdexport.reparam.fold_student import fuse_student
from kdexport.stats.paired import estimate_drop
from training.quantize_aware import TRAINED_RANGES, WEIGHTS, QuantizeAwareJob, train_quantize_aware


def main() -> None:
    """Print a row for float32, calibration, equalised channels and quantize-aware training."""
    asked = _arguments()
    torch.set_num_threads(1)
    trained, data = open_checkpoint(asked.checkpoint), dataset_spec(asked.data, "")
    preprocessing, form = trained.spec.preprocessing, parse_form(asked.form)
    train, test = open_dataset(data, "train"), open_dataset(data, "test")
    chosen, judged = spread(len(train), asked.images), spread(len(test), asked.test_images)
    parts = [chosen[start : start + 16] for start in range(0, len(chosen), 16)]
    batches = [preprocessing.normalise(train.read(part, preprocessing)) for part in parts]
    labels, bits = test.labels[judged], asked.weight_bits if form == "int8-u8" else 8

    def answers(path: Path, form: str) -> NDArray[np.int64]:
        return answers_of(path, form, test, judged, preprocessing)

    with scratch_folder("quantize-aware") as place:
        plain, even, ranges = place / "plain.onnx", place / "even.onnx", place / "ranges.json"
        module = fuse_student(load_student(trained)).module
        export_onnx(module, plain, image_size=preprocessing.image_size, opset=20, metadata={})
        exact = answers(plain, "fp32")

        def measure(source: Path) -> None:
            if asked.method == "auto":
                choose_ranges(source, lambda: batches, ranges, form=parse_form(form), weight_bits=bits)
            else:
                calibrate(source, batches, ranges, method=asked.method, percentile=99.99)

        print(f"fp32       {np.mean(exact == labels):.2%} of {len(labels)} images")

        def report(name: str, source: Path, ranges: Path) -> Path:
            path = place / f"{name}.onnx"
            quantize(source, ranges, path, form=form, weight_bits=bits)
            print(_row(name, exact, answers(path, form), labels), flush=True)
            return path

        measure(plain)
        report("calibrated", plain, ranges)
        found = equalise(onnx.load(str(plain)), {INPUT: np.concatenate(batches[:2])}, through_pooling=True)
        onnx.save(found.model, str(even))
        measure(even)
        start = report("equalised", even, ranges)
        job = QuantizeAwareJob(
            float32=even, quantized=start, ranges=ranges, weight_bits=bits, student=asked.checkpoint, dataset=data,
            settings={
                "epochs": asked.epochs, "batch_size": asked.batch_size, "learning_rate": asked.learning_rate,
                "temperature": 1.0, "cross_entropy": 0.0, "seed": 0, "teacher": "student",
            },
            recipe="", overrides={},
        )  # fmt: skip
        train_quantize_aware(job, place / "run")
        weights = {name: value.numpy() for name, value in load_tensors(place / "run" / WEIGHTS).items()}
        onnx.save(with_weights(onnx.load(str(even)), weights), str(even))
        kept = json.loads(ranges.read_text()) | json.loads((place / "run" / TRAINED_RANGES).read_text())
        ranges.write_text(json.dumps(kept))
        report("trained", even, ranges)


def _row(name: str, exact: NDArray[np.int64], found: NDArray[np.int64], labels: NDArray[np.int64]) -> str:
    was, now = exact == labels, found == labels
    lost, gained = int((was & ~now).sum()), int((now & ~was).sum())
    drop = estimate_drop(lost, gained, len(labels), 0.95)
    return (
        f"{name:10} {np.mean(now):.2%}, flips {np.mean(exact != found):.2%}, {lost} lost, {gained} gained, "
        f"top-1 lost {drop.value:.2%} ({drop.low:.2%} to {drop.high:.2%})"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--form", choices=FORMS, default="int8-u8")
    parser.add_argument("--weight-bits", type=int, choices=(7, 8), default=7, help="of int8-u8")
    parser.add_argument("--method", choices=(*METHODS, "auto"), default="minmax", help="of the calibration")
    parser.add_argument("--images", type=int, default=256, help="for the calibration")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
