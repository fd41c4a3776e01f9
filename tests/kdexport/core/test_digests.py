import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from kdexport.core.digests import digest, source_digest, tool_versions
from kdexport.data import datasets
from kdexport.data.datasets import DatasetSpec, ImageSet, dataset_digest, open_dataset
from kdexport.errors import DataError


def folders(root: Path) -> DatasetSpec:
    for split in ("train", "test"):
        for c, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                noise = np.random.default_rng([c, i, len(split)]).integers(0, 256, (6, 5, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / split / name / f"{i}.png")
    return DatasetSpec(name=f"folder:{root}")


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_the_digest_of_a_value_is_the_sha256_of_its_canonical_json() -> None:
    assert digest({"b": [1, None], "a": "é"}) == hashlib.sha256(b'{"a":"\\u00e9","b":[1,null]}').hexdigest()
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    values = [None, False, 0, "0", [], {}, [0], {"0": 0}, 0.5]
    assert len({digest(value) for value in values}) == len(values)


def test_what_json_cannot_hold_has_no_digest() -> None:
    with pytest.raises(TypeError):
        digest({"path": Path("x")})


def test_versions_come_from_metadata_and_a_missing_package_is_absent() -> None:
    assert tool_versions("numpy", "no-such-package-here") == {"numpy": np.__version__, "no-such-package-here": "absent"}


def test_the_source_digest_is_a_sha256_and_the_same_each_time() -> None:
    assert len(bytes.fromhex(source_digest())) == 32
    assert source_digest() == source_digest()


def test_the_same_data_elsewhere_has_the_same_digest(tmp_path: Path) -> None:
    here = folders(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    there = DatasetSpec(name=f"folder:{tmp_path / 'there'}")
    assert dataset_digest(here, tmp_path / "a") == dataset_digest(there, tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [
        lambda root: flip_last_byte(root / "train" / "bee" / "1.png"),
        lambda root: flip_last_byte(root / "test" / "ant" / "0.png"),
        lambda root: (root / "train" / "bee" / "1.png").unlink(),
        lambda root: shutil.copy(root / "train" / "bee" / "1.png", root / "train" / "bee" / "2.png"),
        lambda root: (root / "train" / "bee" / "1.png").rename(root / "train" / "ant" / "2.png"),
        lambda root: [(root / split / "ant").rename(root / split / "asp") for split in ("train", "test")],
        lambda root: (root / "test" / "ant" / "0.png").rename(root / "test" / "ant" / "9.png"),
    ],
    ids=["a train byte", "a test byte", "removed", "added", "relabelled", "renamed class", "reordered"],
)
def test_the_digest_changes_with_the_content(tmp_path: Path, change: Callable[[Path], object]) -> None:
    spec = folders(tmp_path / "data")
    before = dataset_digest(spec, tmp_path / "memory")
    change(tmp_path / "data")
    assert dataset_digest(spec, tmp_path / "memory") != before


def test_the_digest_is_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = folders(tmp_path / "data")
    first = dataset_digest(spec, tmp_path / "memory")
    opened: list[DatasetSpec] = []

    def count(spec: DatasetSpec, split: Literal["train", "test"]) -> ImageSet:
        opened.append(spec)
        return open_dataset(spec, split)

    monkeypatch.setattr(datasets, "open_dataset", count)
    assert dataset_digest(spec, tmp_path / "memory") == first
    assert opened == []
    # The same bytes with a new time are read again, and found to be the same.
    os.utime(tmp_path / "data" / "train" / "ant" / "0.png", (1, 1))
    assert dataset_digest(spec, tmp_path / "memory") == first
    assert len(opened) == 2
    assert not list((tmp_path / "memory").glob("*.partial"))


def test_splits_with_different_classes_are_refused_with_the_difference(tmp_path: Path) -> None:
    spec = folders(tmp_path / "data")
    shutil.copytree(tmp_path / "data" / "train" / "ant", tmp_path / "data" / "train" / "wasp")
    with pytest.raises(DataError, match="splits have different classes; only in one of them: wasp"):
        dataset_digest(spec, tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_a_missing_data_set_is_an_error_and_is_not_remembered(tmp_path: Path) -> None:
    spec = DatasetSpec(name=f"folder:{tmp_path / 'data'}")
    with pytest.raises(DataError):
        dataset_digest(spec, tmp_path / "memory")
    folders(tmp_path / "data")
    assert dataset_digest(spec, tmp_path / "memory")


def test_digits_have_a_digest_without_any_file(tmp_path: Path) -> None:
    spec = DatasetSpec(name="digits")
    assert dataset_digest(spec, tmp_path / "a") == dataset_digest(spec, tmp_path / "b")


def test_bytes_that_move_from_one_image_to_the_next_change_the_fingerprint(tmp_path: Path) -> None:
    paths = (tmp_path / "0.png", tmp_path / "1.png")

    def written(first: bytes, second: bytes) -> str:
        paths[0].write_bytes(first)
        paths[1].write_bytes(second)
        return ImageSet(classes=("a",), labels=np.zeros(2, np.int64), pixels=None, files=paths).fingerprint()

    assert written(b"ab", b"c") != written(b"a", b"bc")


def test_the_fingerprint_covers_labels_classes_and_pixels() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 3, 3), dtype=np.uint8)

    def of(classes: tuple[str, ...] = ("a", "b"), labels: tuple[int, int] = (0, 1), flip: int = 0) -> str:
        changed = pixels.copy()
        changed[-1, -1, -1, -1] ^= flip
        return ImageSet(classes=classes, labels=np.array(labels), pixels=changed, files=()).fingerprint()

    assert of() == of()
    assert len({of(), of(classes=("b", "a")), of(labels=(1, 1)), of(labels=(1, 0)), of(flip=1)}) == 5


def test_data_behind_symbolic_links_is_told_apart(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        spec = folders(tmp_path / "real" / name)
        if name == "two":
            flip_last_byte(tmp_path / "real" / "two" / "train" / "ant" / "1.png")
        linked = tmp_path / "linked" / name
        linked.mkdir(parents=True)
        for split in ("train", "test"):
            (linked / split).symlink_to(tmp_path / "real" / name / split)
        digests.append(dataset_digest(DatasetSpec(name=f"folder:{linked}"), tmp_path / "memory"))
        assert digests[-1] == dataset_digest(spec, tmp_path / "memory")
    assert digests[0] != digests[1]
