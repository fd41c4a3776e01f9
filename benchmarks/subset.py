"""Make a subset of an image folder with hard links: the first images of each class, for studies on small machines.

python benchmarks/subset.py data/cifar100 data/cifar100-small --train 100 --test 50
python benchmarks/subset.py data/cifar100 data/cifar100-tiny --train 125 --test 100 --classes 20
"""

import argparse
import os
import sys
from pathlib import Path

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def link_first(source: Path, target: Path, count: int, classes: int) -> int:
    """Link the first ``count`` images, by name, of each class folder; the result is the number of links.

    ``classes`` folders at equal distances are taken; 0 means all.
    """
    linked = 0
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    if classes > len(folders):
        sys.exit(f"{source} has {len(folders)} classes ({classes} asked for).")
    for folder in folders[:: len(folders) // classes][:classes] if classes else folders:
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
    parser.add_argument("--classes", type=int, default=0, help="so many classes at equal distances; default all")
    arguments = parser.parse_args()
    if arguments.target.exists():
        parser.error(f"{arguments.target} exists already.")
    for split, count in (("train", arguments.train), ("test", arguments.test)):
        linked = link_first(arguments.source / split, arguments.target / split, count, arguments.classes)
        print(f"{split}: {linked} images")


if __name__ == "__main__":
    main()
