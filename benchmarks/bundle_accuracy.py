"""Top-1 of every ONNX file of a bundle on a test split, and the number of predictions that differ from the unfused one.

python benchmarks/bundle_accuracy.py BUNDLE --data cifar100 --root DIR
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.ort import load_model
from kdexport.bundle.manifest import load_unfused, onnx_files, read_manifest
from kdexport.data.datasets import DatasetSpec, ImageSet, open_dataset
from kdexport.data.preprocessing import Preprocessing
from kdexport.verify.reference import run_torch


def batches(images: ImageSet, preprocessing: Preprocessing, size: int = 500) -> Iterator[NDArray[np.float32]]:
    """Normalised images in batches (n,3,S,S) of at most ``size``, in order."""
    for start in range(0, len(images), size):
        yield preprocessing.normalise(images.read(range(start, min(start + size, len(images))), preprocessing))


def main() -> None:
    """Read the arguments and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--root", default="")
    arguments = parser.parse_args()
    manifest = read_manifest(arguments.bundle)
    images = open_dataset(DatasetSpec(name=arguments.data, root=arguments.root), "test")
    inputs = list(batches(images, manifest.spec.preprocessing))
    unfused = load_unfused(arguments.bundle, manifest.spec)
    reference = np.concatenate([run_torch(unfused, chunk).argmax(1) for chunk in inputs])
    print("| file | images | top-1 | predictions that differ |\n|---|---|---|---|")
    print(f"| unfused student, torch fp32 | {len(images)} | {(reference == images.labels).mean():.2%} | |")
    for name in onnx_files(manifest):
        model = load_model(arguments.bundle / name)
        found = np.concatenate([model.logits(chunk).argmax(1) for chunk in inputs])
        accuracy = (found == images.labels).mean()
        print(f"| {name}, onnxruntime CPU | {len(images)} | {accuracy:.2%} | {(found != reference).sum()} |")


if __name__ == "__main__":
    main()
