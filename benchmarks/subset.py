"""Make a subset of an image folder with hard links: the first images of each class, for studies on small machines.

python benchmarks/subset.py data/cifar100 data/cifar100-small --train 100 --test 50
"""

import argparse
import os
import sys
from pathlib import Path

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def link_first(source: Path, target: Path, count: int) -> int:
    """Link the first ``count`` images, by name, of each class folder; the result is the number of links."""
    linked = 0
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if len(images) < count:
            sys.exit(f"{folder} has {len(images)} images ({count} asked for).")
        (target / folder.name).mkdir(parents=True, exist_ok=True)
        for image in images[:count]:
            os.link(image, target / folder.name / image.name)
            linked += 1
    return linked


def main() -> None:
    """Make the folder; it must not exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--train", type=int, required=True, help="images a class")
    parser.add_argument("--test", type=int, required=True, help="images a class")
    arguments = parser.parse_args()
    if arguments.target.exists():
        parser.error(f"{arguments.target} exists already.")
    for split, count in (("train", arguments.train), ("test", arguments.test)):
        linked = link_first(arguments.source / split, arguments.target / split, count)
        print(f"{split}: {linked} images")


if __name__ == "__main__":
    main()
