import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from kdexport.data.datasets import (
    DatasetSpec,
    ImageSet,
    class_difference,
    dataset_digest,
    dataset_spec,
    described,
    open_dataset,
    source_files,
)
from kdexport.data.preprocessing import Preprocessing, decode
from kdexport.errors import ConfigError, DataError

HALF = (0.5, 0.4, 0.3)
SMALL = Preprocessing(image_size=8, resize=8, mean=HALF, std=HALF)
CIFAR = Preprocessing(image_size=32, resize=32, mean=HALF, std=HALF)
PUBLIC_CIFAR = Path(__file__).parents[3] / ".." / "shared" / "data"


def pixels(seed: int, side: int = 8) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def image_folders(root: Path, test: str = "test", classes: tuple[str, ...] = ("cat", "ant", "bee")) -> DatasetSpec:
    """Three training images and two test images a class, each of its own noise."""
    for s, (split, count) in enumerate((("train", 3), (test, 2))):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(pixels(100 * s + 10 * c + i)).save(folder / f"{i}.png")
    return DatasetSpec(name=f"folder:{root}")


@pytest.fixture(scope="module")
def digits() -> tuple[ImageSet, ImageSet]:
    return open_dataset(DatasetSpec(name="digits"), "train"), open_dataset(DatasetSpec(name="digits"), "test")


def test_digits_have_1437_training_and_360_test_images_of_ten_classes(digits: tuple[ImageSet, ImageSet]) -> None:
    assert [len(split) for split in digits] == [1437, 360]
    for split in digits:
        assert split.classes == tuple("0123456789")
        assert split.pixels is not None
        assert split.pixels.shape == (len(split), 32, 32, 3)
        assert split.pixels.dtype == np.uint8
        assert split.labels.dtype == np.int64


def test_digits_are_stratified(digits: tuple[ImageSet, ImageSet]) -> None:
    train, test = (np.bincount(split.labels, minlength=10) for split in digits)
    assert np.abs(test - (train + test) * 360 / 1797).max() <= 1


def test_no_digit_is_in_both_splits_and_none_is_lost(digits: tuple[ImageSet, ImageSet]) -> None:
    from sklearn.datasets import load_digits

    # Each image is matched to the nearest of the distinct originals, upscaled in the same way.
    def keys(split: ImageSet) -> list[str]:
        assert split.pixels is not None
        return [hashlib.sha256(image.tobytes()).hexdigest() for image in split.pixels]

    train, test = keys(digits[0]), keys(digits[1])
    originals = {image.tobytes() for image in load_digits().images}
    assert len({*train, *test}) == len(originals)
    assert not set(train) & set(test)


def test_digits_keep_their_label_and_their_appearance(digits: tuple[ImageSet, ImageSet]) -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    train = digits[0]
    assert train.pixels is not None
    # Back to 8x8 by averaging blocks of 4x4: the nearest original must carry the same label.
    small = train.pixels[:200, :, :, 0].reshape(200, 8, 4, 8, 4).mean((2, 4)) / 255 * 16
    distance = ((small[:, None] - source.images[None]) ** 2).mean((2, 3))
    assert np.array_equal(source.target[distance.argmin(1)], train.labels[:200])
    assert distance.min(1).max() < 3


def test_digits_are_the_same_each_time(digits: tuple[ImageSet, ImageSet]) -> None:
    assert open_dataset(DatasetSpec(name="digits"), "test").fingerprint() == digits[1].fingerprint()
    assert digits[0].fingerprint() != digits[1].fingerprint()


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folders_are_read_with_sorted_classes(tmp_path: Path, test: str) -> None:
    spec = image_folders(tmp_path, test)
    train, held_out = open_dataset(spec, "train"), open_dataset(spec, "test")
    assert train.classes == held_out.classes == ("ant", "bee", "cat")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [path.parent.name for path in held_out.files] == ["ant", "ant", "bee", "bee", "cat", "cat"]
    assert held_out.labels.tolist() == [0, 0, 1, 1, 2, 2]
    # "cat" was written first, so its noise has the lowest seeds.
    assert np.array_equal(train.read([8, 6, 3], SMALL), np.stack([pixels(2), pixels(0), pixels(20)]))
    assert np.array_equal(held_out.read([5], SMALL)[0], pixels(101))


def test_the_test_folder_is_used_if_test_and_val_both_exist(tmp_path: Path) -> None:
    spec = image_folders(tmp_path)
    shutil.copytree(tmp_path / "test", tmp_path / "val")
    assert all("test" in path.parts for path in open_dataset(spec, "test").files)


def test_every_image_suffix_is_read_in_any_case_and_other_files_are_not(tmp_path: Path) -> None:
    spec = image_folders(tmp_path)
    folder = tmp_path / "train" / "bee"
    for suffix in (".JPG", ".jpeg", ".webp", ".bmp", ".PPM"):
        Image.fromarray(pixels(7)).save(folder / f"more{suffix}")
    (folder / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "README.md").write_text("not a class")
    train = open_dataset(spec, "train")
    assert np.bincount(train.labels).tolist() == [3, 8, 3]
    assert train.classes == ("ant", "bee", "cat")


def test_images_in_folders_within_a_class_folder_belong_to_the_class(tmp_path: Path) -> None:
    spec = image_folders(tmp_path)
    flat = open_dataset(spec, "train").read(range(9), SMALL)
    for name in ("ant", "bee", "cat"):
        deep = tmp_path / "train" / name / "session2" / "evening"
        deep.mkdir(parents=True)
        for image in ("1.png", "2.png"):
            (tmp_path / "train" / name / image).rename(deep / image)
    nested = open_dataset(spec, "train")
    assert nested.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(nested.read(range(9), SMALL), flat)


def test_linked_folders_of_a_class_are_read_and_a_link_to_a_parent_is_refused(tmp_path: Path) -> None:
    spec = image_folders(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(pixels(7)).save(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "data" / "train" / "bee" / "more").symlink_to(tmp_path / "elsewhere")
    assert np.bincount(open_dataset(spec, "train").labels).tolist() == [3, 4, 3]
    (tmp_path / "data" / "train" / "bee" / "loop").symlink_to(tmp_path / "data" / "train")
    with pytest.raises(DataError, match="bee/loop is a link to a folder that contains it"):
        open_dataset(spec, "train")


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".jfif", "JPEG"),
        (".JPE", "JPEG"),
        (".tif", "TIFF"),
        (".tiff", "TIFF"),
        (".gif", "GIF"),
        (".pgm", "PPM"),
        (".pbm", "PPM"),
        (".pnm", "PPM"),
    ],
)
def test_images_of_rare_suffixes_are_read(tmp_path: Path, suffix: str, kind: str) -> None:
    spec = image_folders(tmp_path)
    grey = 255 if suffix == ".pbm" else 200
    picture = Image.new("L", (9, 7), grey).convert({".pgm": "L", ".pbm": "1"}.get(suffix, "RGB"))
    picture.save(tmp_path / "train" / "bee" / f"more{suffix}", format=kind)
    train = open_dataset(spec, "train")
    assert np.bincount(train.labels).tolist() == [3, 4, 3]
    at = [path.suffix for path in train.files].index(suffix)
    assert np.abs(train.read([at], SMALL)[0].astype(int) - grey).max() <= (2 if suffix == ".gif" else 0)


def test_hidden_files_and_those_of_operating_systems_are_no_data(tmp_path: Path) -> None:
    spec = image_folders(tmp_path)
    digest, opened = dataset_digest(spec, tmp_path / "a"), open_dataset(spec, "train")
    folder = tmp_path / "train" / "bee"
    for name in ("._0.png", ".hidden.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    for parent in (folder, tmp_path / "train", tmp_path / "test"):
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (parent / name).mkdir()
            Image.fromarray(pixels(9)).save(parent / name / "copy.png")
    again = open_dataset(spec, "train")
    assert again.classes == ("ant", "bee", "cat")
    assert (again.files, again.ignored) == (opened.files, ())
    assert dataset_digest(spec, tmp_path / "b") == digest


def test_one_line_tells_how_many_images_were_found_and_which_files_were_ignored(tmp_path: Path) -> None:
    spec = image_folders(tmp_path)
    (tmp_path / "train" / "bee" / "deep").mkdir()
    for name in ("bee/notes.txt", "bee/deep/1.JSON", "bee/deep/2.json", "LICENSE"):
        (tmp_path / "train" / name).write_text("no image")
    Image.fromarray(pixels(9)).save(tmp_path / "test" / "stray.png")
    line = (
        "9 training and 6 test images, 3 classes, 5 files ignored "
        "(.json 2, .png outside of the class folders 1, .txt 1, no suffix 1)"
    )
    said: list[str] = []
    for _ in range(2):
        dataset_digest(spec, tmp_path / "memory", said.append)
    assert said == [line, line]
    (tmp_path / "train" / "bee" / "notes.txt").unlink()
    dataset_digest(spec, tmp_path / "memory", said.append)
    assert said[-1].startswith("9 training and 6 test images, 3 classes, 4 files ignored")
    assert described({"test": open_dataset(spec, "test")}).startswith("6 test images, 3 classes, 1 files ignored (.png")
    for _ in range(2):
        dataset_digest(DatasetSpec(name="digits"), tmp_path / "memory", said.append)
        assert said[-1] == "1437 training and 360 test images, 10 classes, 0 files ignored"


def test_images_that_viewers_turn_or_compose_are_counted_before_training(tmp_path: Path) -> None:
    spec = image_folders(tmp_path)
    exif = Image.Exif()
    for value in (1, 6, 3):
        exif[0x0112] = value
        Image.fromarray(pixels(value)).save(tmp_path / "train" / "bee" / f"turned{value}.png", exif=exif)
    said: list[str] = []
    for _ in range(2):
        dataset_digest(spec, tmp_path / "memory", said.append)
    rule = "(docs/preprocessing.md says how they are shown)"
    assert said[1::2] == [f"images with an EXIF orientation: 2 {rule}"] * 2
    Image.fromarray(pixels(9)).convert("RGBA").save(tmp_path / "test" / "bee" / "alpha.png")
    dataset_digest(spec, tmp_path / "memory", said.append)
    assert said[-1] == f"images with an EXIF orientation: 2, with transparency: 1 {rule}"


def test_images_of_a_format_that_is_not_read_are_refused_and_not_left_out(tmp_path: Path) -> None:
    spec = image_folders(tmp_path)
    for name in ("b.HEIC", "a.avif"):
        (tmp_path / "train" / "bee" / name).write_bytes(b"\0\0\0\x18ftyp")
    folder = tmp_path / "train" / "bee"
    unread = [
        f"  {folder / 'a.avif'} is an image in a format that is not read (.avif).",
        f"  {folder / 'b.HEIC'} is an image in a format that is not read (.heic).",
    ]
    with pytest.raises(DataError) as caught:
        open_dataset(spec, "train")
    assert caught.value.message.splitlines() == ["2 of 11 images cannot be used:", *unread]
    assert "convert them to one of .bmp .gif .jfif" in caught.value.remedy
    # With those of the other split and those that are damaged, in one pass.
    (tmp_path / "test" / "ant" / "0.png").write_bytes(b"")
    (tmp_path / "test" / "ant" / "c.nef").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        dataset_digest(spec, tmp_path / "memory")
    lines = caught.value.message.splitlines()
    assert lines[0] == "4 of 18 images cannot be used:"
    assert [line.split(" is ")[0] for line in lines[1:3]] == [
        f"  {tmp_path / 'test' / 'ant' / name}" for name in ("0.png", "c.nef")
    ]
    assert lines[3:] == unread


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP", "PPM", "TIFF"])
def test_a_picture_that_ends_early_behind_a_good_header_is_found_before_the_training(tmp_path: Path, kind: str) -> None:
    spec = image_folders(tmp_path)
    cut = tmp_path / "train" / "bee" / "cut.jpg"
    Image.fromarray(pixels(7, 64)).save(cut, format=kind)
    dataset_digest(spec, tmp_path / "memory")
    cut.write_bytes(cut.read_bytes()[:-200])
    with Image.open(cut) as image:
        assert image.size == (64, 64)
    with pytest.raises(
        DataError, match=r"1 of 16 images.*\n.*cut\.jpg is not a readable image: it is damaged or trunc"
    ):
        dataset_digest(spec, tmp_path / "memory")


def test_links_to_nothing_are_named_and_not_left_out(tmp_path: Path) -> None:
    spec = image_folders(tmp_path)
    for split, name in (("train", "bee/session"), ("test", "cow"), ("train", "ant/x.png")):
        (tmp_path / split / name).symlink_to(tmp_path / "unmounted" / "x")
    (tmp_path / "test" / "ant" / "self.png").symlink_to("self.png")
    with pytest.raises(DataError) as caught:
        dataset_digest(spec, tmp_path / "memory")
    message = caught.value.message
    assert message.splitlines()[0] == "4 of 19 images cannot be used:"
    for name in ("train/bee/session", "test/cow"):
        assert f"{tmp_path / name} is a link to a file or folder that does not exist" in message
    assert "x.png cannot be read: No such file" in message
    assert "self.png cannot be read: Too many levels of symbolic links" in message


@pytest.mark.parametrize(("train", "test"), [("Train", "TEST"), ("training", "testing"), ("TRAIN", "Valid")])
def test_folders_of_splits_are_known_in_any_case(tmp_path: Path, train: str, test: str) -> None:
    spec = image_folders(tmp_path, test)
    (tmp_path / "train").rename(tmp_path / train)
    for split, count in (("train", 9), ("test", 6)):
        opened = open_dataset(spec, split)  # type: ignore[arg-type]
        assert (opened.classes, len(opened)) == (("ant", "bee", "cat"), count)


def test_images_beside_the_splits_are_said_not_to_be_read(tmp_path: Path) -> None:
    spec = image_folders(tmp_path)
    shutil.copytree(tmp_path / "test", tmp_path / "val")
    shutil.copytree(tmp_path / "test" / "bee", tmp_path / "unsorted")
    for name in ("docs", ".git", "@eaDir"):
        (tmp_path / name).mkdir()
    (tmp_path / "@eaDir" / "thumb.jpg").write_bytes(b"")
    (tmp_path / "LICENSE").write_text("text")
    Image.fromarray(pixels(9)).save(tmp_path / "stray.png")
    said: list[str] = []
    dataset_digest(spec, tmp_path / "memory" / "x", said.append)
    assert said == [
        "9 training and 6 test images, 3 classes, 2 files ignored (.png outside of the class folders 1, no suffix 1); "
        "not read: unsorted (2 images), val (6 images)"
    ]


def test_folders_of_storage_systems_are_no_classes(tmp_path: Path) -> None:
    spec = image_folders(tmp_path)
    for name in ("@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "#recycle"):
        for parent in (tmp_path / "train", tmp_path / "train" / "bee"):
            (parent / name).mkdir()
            Image.fromarray(pixels(9)).save(parent / name / "thumb.jpg")
    opened = open_dataset(spec, "train")
    assert (opened.classes, len(opened), opened.ignored) == (("ant", "bee", "cat"), 9, ())


@pytest.mark.parametrize("place", ["images", "ant"])
def test_splits_below_a_class_are_no_images_of_it(tmp_path: Path, place: str) -> None:
    image_folders(tmp_path / "photos" / place)
    with pytest.raises(DataError, match=f"{place} has the folder train and test") as caught:
        open_dataset(DatasetSpec(name=f"folder:{tmp_path / 'photos'}"), "train")
    assert f"pass {tmp_path / 'photos' / place}." in caught.value.remedy


def test_classes_that_differ_only_in_case_are_mentioned(tmp_path: Path) -> None:
    said: list[str] = []
    dataset_digest(image_folders(tmp_path, classes=("Ant", "bee", "ant")), tmp_path / "memory", said.append)
    assert said[0].endswith("3 classes, 0 files ignored; classes with nearly the same name: 'Ant' and 'ant'")


def test_a_file_is_not_a_data_set(tmp_path: Path) -> None:
    for name, remedy in (
        ("photos.ZIP", "Unpack it, and pass the folder."),
        ("photos.txt", "Pass the folder, arranged"),
    ):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(DataError, match="is a file, not a folder of images") as caught:
            open_dataset(DatasetSpec(name=f"folder:{tmp_path / name}"), "train")
        assert caught.value.remedy.startswith(remedy)


def test_the_digest_of_a_flat_data_set_is_that_of_earlier_versions(tmp_path: Path) -> None:
    # Computed here as the versions did that read the files of a class folder only.
    spec, shas = image_folders(tmp_path), []
    for split, count in (("train", 3), ("test", 2)):
        sha = hashlib.sha256(b"ant\0bee\0cat" + np.repeat(np.arange(3), count).astype(np.int64).tobytes())
        for name in ("ant", "bee", "cat"):
            for path in sorted((tmp_path / split / name).iterdir()):
                sha.update(path.stat().st_size.to_bytes(8, "little") + path.read_bytes())
        shas.append(sha.hexdigest())
    expected = hashlib.sha256(f'["{shas[0]}","{shas[1]}"]'.encode()).hexdigest()
    assert dataset_digest(spec, tmp_path / "memory") == expected


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_the_validation_folder_are_understood(tmp_path: Path, name: str) -> None:
    assert len(open_dataset(image_folders(tmp_path, name), "test")) == 6


def test_all_damaged_images_are_named_at_once_before_the_digest(tmp_path: Path) -> None:
    spec = image_folders(tmp_path / "data")
    bad = [tmp_path / "data" / "train" / "bee" / f"bad{i:02}.png" for i in range(22)]
    for path in bad:
        path.write_bytes(b"")
    cut = tmp_path / "data" / "test" / "ant" / "1.png"
    cut.write_bytes(cut.read_bytes()[:70])
    with pytest.raises(DataError) as caught:
        dataset_digest(spec, tmp_path / "memory")
    lines = caught.value.message.splitlines()
    assert lines[0] == "23 of 37 images cannot be used:"
    assert lines[1].startswith(f"  {cut} is not a readable image: it is damaged or truncated")
    assert lines[2].startswith(f"  {bad[0]} is not a readable image: its content is not JPEG, PNG,")
    assert [line.split(" is not")[0].strip() for line in lines[1:]] == [str(cut), *map(str, bad)]
    assert not (tmp_path / "memory").exists()
    for path in (*bad, cut):
        path.unlink()
    assert dataset_digest(spec, tmp_path / "memory")


def test_a_data_set_of_one_class_is_refused(tmp_path: Path) -> None:
    spec = image_folders(tmp_path, classes=("images",))
    with pytest.raises(DataError, match="The data set has one class, images: there is nothing to tell apart"):
        dataset_digest(spec, tmp_path / "memory")


def test_the_original_of_a_file_is_its_bytes_and_of_an_array_a_lossless_png(
    tmp_path: Path, digits: tuple[ImageSet, ImageSet]
) -> None:
    train = open_dataset(image_folders(tmp_path), "train")
    data, suffix = train.original(4)
    assert (data, suffix) == ((tmp_path / "train" / "bee" / "1.png").read_bytes(), ".png")
    assert digits[1].pixels is not None
    data, suffix = digits[1].original(17)
    assert suffix == ".png"
    assert np.array_equal(CIFAR.pixels(decode(data, "digit")), digits[1].pixels[17])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / "train"), r"has no folder train or training; it has test\."),
        (lambda root: list(map(shutil.rmtree, (root / "train").iterdir())), "contains no class folder"),
        (lambda root: list(map(Path.unlink, (root / "train" / "bee").iterdir())), r"train/bee contains no image"),
        (lambda root: (root / "train" / "empty").mkdir(), r"train/empty contains no image"),
        (lambda root: shutil.rmtree(root), r"There is no folder .*data\."),
    ],
    ids=["no split", "no class", "emptied class", "empty class", "nothing"],
)
def test_a_missing_or_empty_folder_is_named(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    spec = image_folders(tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        open_dataset(spec, "train")


def test_a_missing_test_split_is_named_with_both_names_and_the_layout(tmp_path: Path) -> None:
    spec = image_folders(tmp_path)
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(
        DataError, match="has no folder test or testing or val or valid or validation; it has train"
    ) as (caught):
        open_dataset(spec, "test")
    assert f"Or pass {tmp_path / 'train'} alone, and a test split is drawn" in caught.value.remedy
    assert "DIR/train/<class>/*.png" in caught.value.remedy


def test_an_unreadable_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    train = open_dataset(image_folders(tmp_path), "train")
    bad = tmp_path / "train" / "bee" / "1.png"
    bad.write_bytes(bad.read_bytes()[:70])
    with pytest.raises(DataError, match=r"train/bee/1\.png is not a readable image"):
        train.read([3, 4], SMALL)
    bad.unlink()
    with pytest.raises(DataError, match=r"train/bee/1\.png cannot be read"):
        train.read([4], SMALL)
    assert train.read([3, 5], SMALL).shape == (2, 8, 8, 3)


@pytest.mark.parametrize("name", ["digit", "cifar10", "", "Digits", "folder"])
def test_an_unknown_data_set_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match="There is no data set named") as caught:
        open_dataset(DatasetSpec(name=name), "train")
    assert "cifar100, digits, folder:PATH" in caught.value.remedy


@pytest.mark.parametrize("exists", [True, False])
def test_a_missing_cifar_archive_is_an_error_with_the_ways_to_provide_it(tmp_path: Path, exists: bool) -> None:
    root = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(DataError, match=f"CIFAR-100 was not found in {root}") as caught:
        open_dataset(DatasetSpec(name="cifar100", root=str(root)), "train")
    for way in ("cifar-100-python", "image folders", "--data DIR", "[data]"):
        assert way in caught.value.remedy


def test_cifar_can_be_image_folders(tmp_path: Path) -> None:
    image_folders(tmp_path)
    assert len(open_dataset(DatasetSpec(name="cifar100", root=str(tmp_path)), "test")) == 6
    without_splits = open_dataset(DatasetSpec(name="cifar100", root=str(tmp_path / "train")), "test")
    assert (without_splits.classes, len(without_splits)) == (("ant", "bee", "cat"), 3)


@pytest.mark.parametrize("nested", [True, False])
def test_a_foreign_cifar_archive_is_refused_and_never_unpickled(tmp_path: Path, nested: bool) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    archive = tmp_path / "cifar-100-python"
    archive.mkdir()
    for name in ("train", "test", "meta"):
        (archive / name).write_bytes(pickle.dumps(Trap()))
    for split in ("train", "test"):
        with pytest.raises(DataError, match=r"The CIFAR-100 archive in .* is incomplete or modified"):
            open_dataset(DatasetSpec(name="cifar100", root=str(tmp_path if nested else archive)), split)
    assert not (tmp_path / "executed").exists()


def test_sources_are_the_files_that_are_read(tmp_path: Path) -> None:
    spec = image_folders(tmp_path)
    (tmp_path / "train" / "notes.txt").write_text("no")
    found = source_files(spec)
    assert len(found) == 15
    assert found == sorted(found)
    assert {*open_dataset(spec, "train").files, *open_dataset(spec, "test").files} == set(found)
    assert source_files(DatasetSpec(name="digits")) == []
    archive = tmp_path / "cifar-100-python"
    archive.mkdir()
    (archive / "meta").touch()
    names = [path.name for path in source_files(DatasetSpec(name="cifar100", root=str(tmp_path)))]
    assert names == ["train", "test", "meta"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_whole_of_cifar100_is_read_from_image_folders(tmp_path: Path) -> None:
    unpack = PUBLIC_CIFAR / "unpack.py"
    if not unpack.is_file() or not (PUBLIC_CIFAR / "cifar100").is_dir():
        pytest.skip("CIFAR-100 is not in ../shared/data")
    subprocess.run([sys.executable, str(unpack), "cifar100", "--to", str(tmp_path)], check=True)
    spec = DatasetSpec(name="cifar100", root=str(tmp_path))
    train, test = open_dataset(spec, "train"), open_dataset(spec, "test")
    assert train.classes == test.classes
    assert np.bincount(train.labels).tolist() == [500] * 100
    assert np.bincount(test.labels).tolist() == [100] * 100
    assert {"apple", "worm", "aquarium_fish"} <= set(train.classes)
    # The published mean and standard deviation of the channels, over a sample that is even over the classes.
    sample = train.read(range(0, 50_000, 25), CIFAR).reshape(-1, 3) / 255
    np.testing.assert_allclose(sample.mean(0), (0.5071, 0.4867, 0.4408), atol=0.015)
    np.testing.assert_allclose(sample.std(0), (0.2675, 0.2565, 0.2761), atol=0.015)
    # 60,000 files, which pytest would keep for three runs.
    shutil.rmtree(tmp_path)


def test_a_root_folder_replaces_the_path_of_a_data_set_and_is_refused_for_digits() -> None:
    assert dataset_spec("folder:/nowhere", "/elsewhere").name == "folder:/elsewhere"
    assert dataset_spec("cifar100", "/elsewhere").root == "/elsewhere"
    with pytest.raises(ConfigError, match="/elsewhere"):
        dataset_spec("digits", "/elsewhere")


def noise_folders(root: Path) -> DatasetSpec:
    """Two training and two test images for each of two classes, each of its own noise."""
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


def test_the_same_data_elsewhere_has_the_same_digest(tmp_path: Path) -> None:
    here = noise_folders(tmp_path / "here")
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
    spec = noise_folders(tmp_path / "data")
    before = dataset_digest(spec, tmp_path / "memory")
    change(tmp_path / "data")
    assert dataset_digest(spec, tmp_path / "memory") != before


def test_the_digest_is_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = noise_folders(tmp_path / "data")
    first = dataset_digest(spec, tmp_path / "memory")
    read: list[Path] = []
    read_bytes = Path.read_bytes

    def count(path: Path) -> bytes:
        read.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", count)
    assert dataset_digest(spec, tmp_path / "memory") == first
    assert read == []
    # The same bytes with a new time are read again, and found to be the same.
    os.utime(tmp_path / "data" / "train" / "ant" / "0.png", (1, 1))
    assert dataset_digest(spec, tmp_path / "memory") == first
    # Once to check that they are images, and once for the digest.
    assert len(read) == 16
    assert not list((tmp_path / "memory").glob("*.partial*"))


@pytest.mark.parametrize("opened", ["train", "test"])
def test_a_split_is_not_opened_while_the_other_has_different_classes(
    tmp_path: Path, opened: Literal["train", "test"]
) -> None:
    # Positions are labels: without "bee" in test, a "cat" of test would have the label of a training "bee".
    spec = image_folders(tmp_path, "val")
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "zebra")
    with pytest.raises(DataError) as caught:
        open_dataset(spec, opened)
    assert caught.value.message == (
        f"The training and test splits of {tmp_path} have different classes: only in train: bee; only in val: zebra."
    )
    assert caught.value.remedy == (
        "Add a folder with images for every class to both train and val, or remove the classes that one of them does "
        "not have."
    )
    shutil.rmtree(tmp_path / "val" / "zebra")
    with pytest.raises(DataError, match=r"different classes: only in train: bee\.\n"):
        open_dataset(spec, opened)
    with pytest.raises(DataError, match="only in train: bee"):
        open_dataset(DatasetSpec(name="cifar100", root=str(tmp_path)), opened)
    with pytest.raises(DataError, match="only in train: bee"):
        dataset_digest(spec, tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_a_folder_with_one_split_is_opened(tmp_path: Path) -> None:
    spec = image_folders(tmp_path)
    shutil.rmtree(tmp_path / "train")
    assert open_dataset(spec, "test").classes == ("ant", "bee", "cat")


def test_a_network_that_is_only_evaluated_needs_no_training_images(tmp_path: Path) -> None:
    spec, lines = image_folders(tmp_path / "data"), list[str]()
    whole = dataset_digest(spec, tmp_path / "memory", trains=False)
    assert whole == dataset_digest(spec, tmp_path / "memory")
    shutil.rmtree(tmp_path / "data" / "train")
    with pytest.raises(DataError, match="has no folder train"):
        dataset_digest(spec, tmp_path / "memory")
    for _ in range(2):
        # The second time from the memory.
        assert dataset_digest(spec, tmp_path / "memory", lines.append, trains=False) != whole
    assert lines == ["6 test images, 3 classes, 0 files ignored"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_text_are_refused_for_classes_and_read_for_images(tmp_path: Path) -> None:
    spec = image_folders(tmp_path / "data")
    odd = os.fsdecode(b"gr\xfcn")
    image = tmp_path / "data" / "train" / "cat" / "0.png"
    image.rename(image.with_name(f"{odd}.png"))
    dataset_digest(spec, tmp_path / "memory")
    for split in ("train", "test"):
        (tmp_path / "data" / split / "cat").rename(tmp_path / "data" / split / odd)
    with pytest.raises(DataError, match="has a name that is not text in UTF-8") as caught:
        dataset_digest(spec, tmp_path / "memory")
    caught.value.message.encode()


@pytest.mark.parametrize(
    ("one", "two", "words"),
    [
        ("abc", "acd", "only in A: b; only in B: d"),
        ("ab", "abcdefghi", "only in B: c, d, e, f, g and 2 more"),
        ("ab", "ba", "the same names in a different order"),
    ],
)
def test_the_difference_of_classes_is_told_by_name(one: str, two: str, words: str) -> None:
    assert class_difference(tuple(one), tuple(two), "A", "B") == words


def test_a_missing_data_set_is_an_error_and_is_not_remembered(tmp_path: Path) -> None:
    spec = DatasetSpec(name=f"folder:{tmp_path / 'data'}")
    with pytest.raises(DataError):
        dataset_digest(spec, tmp_path / "memory")
    noise_folders(tmp_path / "data")
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


def test_different_data_behind_symbolic_links_has_different_digests(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        spec = noise_folders(tmp_path / "real" / name)
        if name == "two":
            flip_last_byte(tmp_path / "real" / "two" / "train" / "ant" / "1.png")
        linked = tmp_path / "linked" / name
        linked.mkdir(parents=True)
        for split in ("train", "test"):
            (linked / split).symlink_to(tmp_path / "real" / name / split)
        digests.append(dataset_digest(DatasetSpec(name=f"folder:{linked}"), tmp_path / "memory"))
        assert digests[-1] == dataset_digest(spec, tmp_path / "memory")
    assert digests[0] != digests[1]


def class_folders(root: Path, counts: dict[str, int]) -> DatasetSpec:
    """Folders of classes without splits, each image of its own noise."""
    for c, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(pixels(1000 + 100 * c + i)).save(root / name / f"photo {i}.png")
    return DatasetSpec(name=f"folder:{root}")


def by_class(images: ImageSet) -> dict[str, set[str]]:
    return {
        name: {path.name for path, label in zip(images.files, images.labels, strict=True) if label == index}
        for index, name in enumerate(images.classes)
    }


def test_a_folder_without_splits_is_split_by_class_without_loss_or_overlap(tmp_path: Path) -> None:
    counts = {"cat": 20, "ant": 2, "bee": 13}
    spec = class_folders(tmp_path, counts)
    train, test = by_class(open_dataset(spec, "train")), by_class(open_dataset(spec, "test"))
    assert list(train) == list(test) == ["ant", "bee", "cat"]
    # A fifth of each class, at least one image.
    assert {name: len(files) for name, files in test.items()} == {"ant": 1, "bee": 3, "cat": 4}
    for name, count in counts.items():
        assert not train[name] & test[name]
        assert train[name] | test[name] == {f"photo {i}.png" for i in range(count)}


def test_the_drawn_split_depends_on_names_alone(tmp_path: Path) -> None:
    spec = class_folders(tmp_path / "one", {"cat": 12, "ant": 12})
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere")
    other = DatasetSpec(name=f"folder:{tmp_path / 'elsewhere'}")
    for split in ("train", "test"):
        assert by_class(open_dataset(spec, split)) == by_class(open_dataset(other, split))
    assert dataset_digest(spec, tmp_path / "memory") == dataset_digest(other, tmp_path / "memory")
    # An image more moves at most one other image per class from one split to the other.
    before = by_class(open_dataset(spec, "test"))["cat"]
    Image.fromarray(pixels(7)).save(tmp_path / "one" / "cat" / "new.png")
    after = by_class(open_dataset(spec, "test"))["cat"]
    assert len(before ^ after) <= 2


def test_the_drawn_split_is_the_documented_one(tmp_path: Path) -> None:
    spec = class_folders(tmp_path, {"a": 5, "b": 5})
    # The images whose names have the smallest sha256.
    expected = {
        name: {min((f"photo {i}.png" for i in range(5)), key=lambda f: hashlib.sha256(
            b"0\0" + name.encode() + b"\0" + name.encode() + b"/" + f.encode()).hexdigest())}
        for name in "ab"
    }  # fmt: skip
    assert by_class(open_dataset(spec, "test")) == expected


def test_a_drawn_split_is_told_in_the_line_on_the_images(tmp_path: Path) -> None:
    spec = class_folders(tmp_path / "data", {"cat": 10, "ant": 10})
    (tmp_path / "data" / "notes.txt").write_text("x")
    lines: list[str] = []
    dataset_digest(spec, tmp_path / "memory", lines.append)
    dataset_digest(spec, tmp_path / "memory", lines.append)
    assert (
        lines
        == [
            "16 training and 4 test images, 2 classes, 1 files ignored (.txt 1); "
            "test split drawn: 20% of each class, by file name, seed 0"
        ]
        * 2
    )


def test_a_class_of_one_image_cannot_be_split_and_is_named(tmp_path: Path) -> None:
    spec = class_folders(tmp_path, {"cat": 10, "ant": 1, "bee": 1})
    with pytest.raises(DataError, match=r"2 classes have one image: ant, bee\."):
        open_dataset(spec, "train")


def test_class_names_are_composed_and_sorted_as_such(tmp_path: Path) -> None:
    # The decomposed e with an accent sorts before f, the composed one after z.
    spec = class_folders(tmp_path, {"e\u0301t": 3, "f": 3, "z": 3})
    assert open_dataset(spec, "train").classes == ("f", "z", "\u00e9t")
    split = image_folders(tmp_path / "stored", classes=("e\u0301t", "f"))
    (tmp_path / "stored" / "test" / "e\u0301t").rename(tmp_path / "stored" / "test" / "\u00e9t")
    assert open_dataset(split, "train").classes == open_dataset(split, "test").classes == ("f", "\u00e9t")


def test_two_folders_whose_names_differ_in_their_unicode_form_only_are_refused(tmp_path: Path) -> None:
    spec = class_folders(tmp_path, {"e\u0301t": 3, "\u00e9t": 3})
    with pytest.raises(DataError, match=r"differ only in their Unicode form: 'e\\u0301t' and '\\xe9t'"):
        open_dataset(spec, "train")


def test_a_folder_with_one_stored_split_is_never_drawn(tmp_path: Path) -> None:
    spec = class_folders(tmp_path, {"train": 5, "ant": 5})
    with pytest.raises(DataError, match="contains no class folder"):
        open_dataset(spec, "train")
