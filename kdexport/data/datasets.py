"""Data sets: the scikit-learn digits, CIFAR-100 archives, and image folders.

Training and verification read images in the same way; augmentation is part of ``training``.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from kdexport.core.digests import digest, tool_versions
from kdexport.core.files import write_text
from kdexport.data.exif_and_alpha import ImageFacts
from kdexport.data.preprocessing import Preprocessing, check_image, read_image
from kdexport.errors import ConfigError, DataError
from kdexport.registry import nearest

if TYPE_CHECKING:
    from PIL import Image

Split = Literal["train", "test"]
#: Suffixes, in any case, of the files that are images: those of ``preprocessing.FORMATS``.
SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff"),
    ".webp",
)
#: Suffixes of images in formats that are not read. Such a file is an error, because an image would be missing.
_UNREAD_SUFFIXES = (
    *(".arw", ".avif", ".cr2", ".cr3", ".dng", ".exr", ".heic", ".heif", ".j2k", ".jp2", ".jxl", ".nef", ".psd"),
    ".tga",
)
#: Files and folders, in lower case, that operating systems write into folders of images.
_SYSTEM_NAMES = (
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "icon\r", "@eadir", "#recycle", "$recycle.bin"),
    *("system volume information", "lost+found"),
)
#: Names of the folders of a split, in any case; the first that exists is read.
_SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}
_MOST_NAMED = 20
#: Images in folders that are not read are counted up to this number.
_MOST_COUNTED = 100_000
_CIFAR_FOLDER = "cifar-100-python"
_LAYOUT = (
    "DIR/train/<class>/*.png and DIR/test/<class>/*.png (or val/, valid/, validation/), or without splits as "
    "DIR/<class>/*.png"
)
#: The part of the images of each class that is the test split of a folder without splits, and the seed of the draw.
_TEST_SHARE = 0.2
_SPLIT_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """``name`` is ``digits``, ``cifar100`` or ``folder:PATH``; ``root`` is the folder of cifar100."""

    name: str
    root: str = ""


def dataset_spec(name: str, root: str) -> DatasetSpec:
    """The data set ``name`` at ``root``, which replaces the path of an image folder; ``ConfigError`` for digits."""
    if name.startswith("folder:") and root:
        return DatasetSpec(name=f"folder:{root.removeprefix('folder:')}")
    if name == "digits" and root:
        raise ConfigError(
            f"The data set digits is part of scikit-learn and cannot be read from {root}.",
            remedy="Omit --data and `root`, or use a different data set.",
        )
    return DatasetSpec(name=name, root=root)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageSet:
    """One split: N labelled images, read one at a time, with a fingerprint of their content.

    ``pixels`` (N,H,W,3) uint8 holds them if the data set is one array; ``files`` lists them if they are image files.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    pixels: NDArray[np.uint8] | None
    files: tuple[Path, ...]
    #: Files of the data set that are not images, or not in a class folder.
    ignored: tuple[Path, ...] = ()
    #: Folders with images beside those of the splits, in words: "val (1000 images)".
    unread: tuple[str, ...] = ()
    #: How the splits were drawn; empty if they are stored as splits.
    drawn: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def original(self, index: int) -> tuple[bytes, str]:
        """The bytes of an image file and its suffix; an image from an array is encoded losslessly as PNG."""
        if self.pixels is None:
            path = self.files[index]
            return path.read_bytes(), path.suffix.lower()
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.pixels[index]).save(buffer, format="PNG")
        return buffer.getvalue(), ".png"

    def read(self, indices: Sequence[int], preprocessing: Preprocessing) -> NDArray[np.uint8]:
        """The images at ``indices``, resized and cropped: (len(indices), S, S, 3) uint8."""
        return np.stack([preprocessing.pixels(self.image(index)) for index in indices])

    def image(self, index: int) -> "Image.Image":
        """One decoded image in its original size; raises ``DataError`` if its file cannot be read."""
        if self.pixels is None:
            return read_image(self.files[index])
        from PIL import Image

        return Image.fromarray(self.pixels[index])

    def fingerprint(self) -> str:
        """sha256 of classes, labels and the bytes of all images."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        digest.update(self.labels.tobytes())
        if self.pixels is not None:
            digest.update(np.ascontiguousarray(self.pixels).tobytes())
        for path in self.files:
            data = path.read_bytes()
            # The length is hashed too, so that moving bytes from one image to the next changes the fingerprint.
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


def open_dataset(spec: DatasetSpec, split: Split) -> ImageSet:
    """Open one split. Raises ``DataError`` if it is missing or empty, ``ConfigError`` for an unknown name.

    Raises ``DataError`` too if the other split is there and has different classes, because a label is the position of
    its class among the classes of its split.
    """
    if spec.name.startswith("folder:"):
        return _open_folder(Path(spec.name.removeprefix("folder:")), split)
    readers: dict[str, Callable[[DatasetSpec, Split], ImageSet]] = {"digits": _open_digits, "cifar100": _open_cifar100}
    _require_known(spec.name)
    return readers[spec.name](spec, split)


def _require_known(name: str) -> None:
    known = ("digits", "cifar100")
    if name not in known and not name.startswith("folder:"):
        raise ConfigError(f"There is no data set named {name!r}.", remedy=nearest(name, [*known, "folder:PATH"]))


def source_files(spec: DatasetSpec) -> list[Path]:
    """The files of a data set, so that changes can be detected cheaply; empty for data that is part of a package."""
    _require_known(spec.name)
    if spec.name == "digits":
        return []
    archive = _cifar_archive(Path(spec.root)) if spec.name == "cifar100" else None
    if archive is not None:
        return [archive / name for name in ("train", "test", "meta")]
    return sorted(path for images in _open_both(spec).values() for path in images.files)


def _is_array(spec: DatasetSpec) -> bool:
    return spec.name == "digits" or (spec.name == "cifar100" and _cifar_archive(Path(spec.root)) is not None)


def _open_digits(_spec: DatasetSpec, split: Split) -> ImageSet:
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    indices = np.arange(len(grey))
    train, test = train_test_split(indices, test_size=360, random_state=0, stratify=digits.target)
    chosen = np.sort(train if split == "train" else test)
    large = [Image.fromarray(grey[i]).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for i in chosen]
    return ImageSet(
        classes=tuple(str(digit) for digit in range(10)),
        labels=digits.target[chosen].astype(np.int64),
        pixels=np.stack([np.asarray(image, dtype=np.uint8) for image in large]),
        files=(),
    )


def _cifar_archive(root: Path) -> Path | None:
    return next((folder for folder in (root, root / _CIFAR_FOLDER) if (folder / "meta").is_file()), None)


def is_cifar100(root: Path) -> bool:
    """Whether ``root`` has CIFAR-100: the archive, or splits of 100 classes whose images have 32x32 pixels.

    One image of each class is looked at.
    """
    if _cifar_archive(root) is not None or (root / _CIFAR_FOLDER).is_dir():
        return True
    train = _split_folder(root, "train")
    folders = _class_folders(train) if train is not None else {}
    return len(folders) == 100 and all(_first_size(folder) == (32, 32) for folder in folders.values())


def _has_images_of_classes(root: Path) -> bool:
    """Whether ``root`` has folders with images, which can be classes; a place of archives has none."""
    folders = _class_folders(root).values() if root.is_dir() else ()
    return sum(_first_size(folder) is not None for folder in islice(folders, _MOST_NAMED)) > 1


def _first_size(folder: Path) -> tuple[int, int] | None:
    from PIL import Image

    first = next((path for path in _files_below(folder) if path.suffix.lower() in SUFFIXES), None)
    try:
        with Image.open(first or folder) as image:
            return image.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _open_cifar100(spec: DatasetSpec, split: Split) -> ImageSet:
    root = Path(spec.root)
    archive = _cifar_archive(root)
    if archive is None:
        if has_stored_splits(root) or _has_images_of_classes(root):
            return _open_folder(root, split)
        raise DataError(
            f"CIFAR-100 was not found in {root}.",
            remedy=f"Pass the folder with --data DIR or `root` under [data]: it must contain the official archive, "
            f"unpacked as {_CIFAR_FOLDER}, or image folders ({_LAYOUT}).",
        )
    from torchvision.datasets import CIFAR100

    try:
        # torchvision checks the MD5 of the archive before unpickling it, so no untrusted pickle is loaded.
        data = CIFAR100(str(archive.parent), train=split == "train", download=False)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise DataError(
            f"The CIFAR-100 archive in {archive} is incomplete or modified: {error}.",
            remedy="Download and unpack the official archive again.",
        ) from error
    return ImageSet(classes=tuple(data.classes), labels=np.asarray(data.targets, np.int64), pixels=data.data, files=())


def _split_folder(root: Path, split: Split) -> Path | None:
    return next(iter(_split_folders(root, split)), None)


def _split_folders(root: Path, *splits: Split) -> list[Path]:
    """The folders in ``root`` with a name of one of ``splits``, in the order in which they are preferred."""
    if not root.is_dir():
        return []
    folders: dict[str, list[Path]] = {}
    for entry in sorted(entry for entry in root.iterdir() if entry.is_dir()):
        folders.setdefault(entry.name.lower(), []).append(entry)
    return [entry for split in splits for name in _SPLIT_FOLDERS[split] for entry in folders.get(name, ())]


def _is_data(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _SYSTEM_NAMES


def _class_folders(folder: Path) -> dict[str, Path]:
    """The folders of the classes by name, sorted by name.

    Names are in the composed form of Unicode (NFC): some file systems decompose letters with accents, and the order of
    the classes, which are the labels, must be the same on every machine.
    """
    found: dict[str, Path] = {}
    for entry in sorted(entry for entry in folder.iterdir() if entry.is_dir() and _is_data(entry.name)):
        name = unicodedata.normalize("NFC", entry.name)
        if not _is_text(name):
            raise DataError(
                f"The class folder {str(entry)!a} has a name that is not text in UTF-8.",
                remedy="Rename the folder: the names of the classes are stored as text.",
            )
        if name in found:
            raise DataError(
                f"{folder} has two folders of the class {name}, whose names differ only in their Unicode form: "
                f"{found[name].name!a} and {entry.name!a}.",
                remedy="Move the images of both into one folder.",
            )
        found[name] = entry
    return dict(sorted(found.items()))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _class_names(split_folder: Path) -> list[str]:
    return list(_class_folders(split_folder))


def _files_below(folder: Path) -> list[Path]:
    """The files in ``folder`` and all folders in it, sorted; symbolic links are followed."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise_unreadable):
        folders[:] = filter(_is_data, folders)
        for name in folders:
            path = Path(parent, name)
            if path.is_symlink() and Path(parent).resolve().is_relative_to(path.resolve()):
                raise DataError(f"{path} is a link to a folder that contains it.", remedy="Remove the link.")
        found += [Path(parent, name) for name in names if _is_data(name)]
    return sorted(found)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise DataError(
        f"{error.filename} cannot be read: {error.strerror}.", remedy="Check the path and its permissions."
    ) from error


def _require_same_classes(root: Path) -> None:
    """A label is the position of a class folder: with a folder in one split only, the labels of both splits differ."""
    train, test = _split_folder(root, "train"), _split_folder(root, "test")
    if train is None or test is None:
        return
    names, others = _class_names(train), _class_names(test)
    if names and others and names != others:
        raise DataError(
            f"The training and test splits of {root} have different classes: "
            f"{class_difference(names, others, train.name, test.name)}.",
            remedy=f"Add a folder with images for every class to both {train.name} and {test.name}, or remove the "
            "classes that one of them does not have.",
        )


def class_difference(one: Sequence[str], two: Sequence[str], one_name: str, two_name: str) -> str:
    """How two lists of classes differ, in words: the classes that one of them does not have, at most 5 of each."""
    parts = []
    for name, classes, others in ((one_name, one, two), (two_name, two, one)):
        only = sorted(set(classes) - set(others))
        more = f" and {len(only) - 5} more" if len(only) > 5 else ""
        # A space at the end of a name would not be seen.
        shown = [each if each == each.strip() and each.isprintable() else repr(each) for each in only[:5]]
        parts += [f"only in {name}: {', '.join(shown)}{more}"] if only else []
    return "; ".join(parts) or "the same names in a different order"


def has_stored_splits(root: Path) -> bool:
    """Whether an image folder has a folder for one of its splits; without any, its test split is drawn."""
    return any(_split_folder(root, split) is not None for split in ("train", "test"))


def _open_folder(root: Path, split: Split) -> ImageSet:
    require_folder(root)
    if not has_stored_splits(root) and _class_folders(root):
        return _open_drawn(root, split)
    found = _split_folder(root, split)
    if found is None:
        raise _missing_split(root, split)
    images, ignored = _images_by_class(found)
    _require_same_classes(root)
    beside, unread = _beside_splits(root) if split == "test" else ([], ())
    return _image_set(images, [*ignored, *beside], unread=unread)


def require_folder(root: Path) -> None:
    """Raise ``DataError`` unless ``root`` is a folder."""
    if root.is_file():
        archive = root.name.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"))
        raise DataError(
            f"{root} is a file, not a folder of images.",
            remedy="Unpack it, and pass the folder." if archive else f"Pass the folder, arranged as {_LAYOUT}.",
        )
    if not root.is_dir():
        raise DataError(f"There is no folder {root}.", remedy=f"Pass a folder of images, arranged as {_LAYOUT}.")


def _missing_split(root: Path, split: Split) -> DataError:
    other = _split_folder(root, "train" if split == "test" else "test")
    drawn = "" if other is None else f" Or pass {other} alone, and a test split is drawn from its images."
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and _is_data(entry.name))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    has = f"; it has {', '.join(names[:5])}{more}" if names else ""
    return DataError(
        f"{root} has no folder {' or '.join(_SPLIT_FOLDERS[split])}{has}.",
        remedy=f"Arrange images as {_LAYOUT}.{drawn}",
    )


def _beside_splits(root: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The files in ``root`` itself, and in words the folders with images that are not read as a split."""
    read = (_split_folder(root, "train"), _split_folder(root, "test"))
    entries = sorted(entry for entry in root.iterdir() if _is_data(entry.name) and entry not in read)
    counts = {entry.name: _count_images(entry) for entry in entries if entry.is_dir()}
    unread = tuple(
        f"{name} ({'at least ' if count == _MOST_COUNTED else ''}{count} images)"
        for name, count in counts.items()
        if count
    )
    return [entry for entry in entries if not entry.is_dir()], unread


def _count_images(folder: Path) -> int:
    found = (
        name
        for _, _, names in os.walk(folder)
        for name in names
        if _is_data(name) and Path(name).suffix.lower() in (*SUFFIXES, *_UNREAD_SUFFIXES)
    )
    return sum(1 for _ in islice(found, _MOST_COUNTED))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scan:
    """The image files of each class folder, the files that are not images or not in one, and what is wrong."""

    images: dict[str, list[Path]]
    ignored: list[Path]
    problems: list[str]


def _scanned(folder: Path) -> _Scan:
    beside = [path for path in folder.iterdir() if not path.is_dir() and _is_data(path.name)]
    files: dict[str, list[Path]] = {name: _files_below(place) for name, place in _class_folders(folder).items()}
    images = {name: [path for path in own if path.suffix.lower() in SUFFIXES] for name, own in files.items()}
    others = [*beside, *(path for own in files.values() for path in own if path.suffix.lower() not in SUFFIXES)]
    problems = [problem for path in sorted(others) if (problem := _problem_of(path)) is not None]
    return _Scan(images=images, ignored=others, problems=problems)


def _problem_of(path: Path) -> str | None:
    """Why images may be missing because of a file that is not read as one; None if they are not."""
    suffix = path.suffix.lower()
    if suffix in _UNREAD_SUFFIXES:
        return f"{path} is an image in a format that is not read ({suffix})."
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to a file or folder that does not exist."
    return None


def _images_by_class(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The image files of each class folder in ``folder``, and the files that are not images or not in one."""
    found = _scanned(folder)
    if found.problems:
        count = sum(map(len, found.images.values()))
        raise _unusable(found.problems, count + len(found.problems))
    empty = [str(folder / name) for name, images in found.images.items() if not images]
    if empty:
        more = f" and {len(empty) - _MOST_NAMED} more" if len(empty) > _MOST_NAMED else ""
        verb = "contains" if len(empty) == 1 else "contain"
        raise DataError(
            f"{', '.join(empty[:_MOST_NAMED])}{more} {verb} no image.",
            remedy=f"Add images ({' '.join(SUFFIXES)}) or remove the folder.",
        )
    if not found.images:
        raise DataError(f"{folder} contains no class folder.", remedy=f"Arrange images as {_LAYOUT}.")
    return found.images, found.ignored


def _unusable(problems: Sequence[str], total: int) -> DataError:
    # All of them: with a list that is cut off, each run would find the next ones.
    return DataError(
        "\n  ".join([f"{len(problems)} of {total} images cannot be used:", *problems]),
        remedy=f"Repair these files, convert them to one of {' '.join(SUFFIXES)}, or remove them.",
    )


def image_files(folder: Path) -> list[Path]:
    """Every image file in ``folder`` and the folders in it, sorted; also those in formats that are not read."""
    return [path for path in _files_below(folder) if path.suffix.lower() in (*SUFFIXES, *_UNREAD_SUFFIXES)]


def open_unsplit(root: Path) -> ImageSet:
    """All images of a folder with a folder for each class, without a split; raises ``DataError``."""
    return _image_set(*_images_by_class(root))


def _image_set(
    images: Mapping[str, Sequence[Path]], ignored: Sequence[Path], drawn: str = "", unread: tuple[str, ...] = ()
) -> ImageSet:
    labels = [label for label, files in enumerate(images.values()) for _ in files]
    return ImageSet(
        classes=tuple(images),
        labels=np.asarray(labels, np.int64),
        pixels=None,
        files=tuple(path for files in images.values() for path in files),
        ignored=tuple(sorted(ignored)),
        unread=unread,
        drawn=drawn,
    )


def _open_drawn(root: Path, split: Split) -> ImageSet:
    """A split of a folder of classes without splits: the same images on every machine, because names decide alone."""
    images, ignored = _images_by_class(root)
    _require_no_splits_below(root)
    single = [name for name, files in images.items() if len(files) < 2]
    if single:
        raise DataError(
            f"{root} has no folders train and test, and so its test split is drawn from each class, but "
            f"{len(single)} classes have one image: {', '.join(single[:_MOST_NAMED])}.",
            remedy="Add images to these classes or remove their folders, or arrange images as DIR/train/<class>/* and "
            "DIR/test/<class>/*.",
        )
    chosen: dict[str, list[Path]] = {}
    for name, files in images.items():
        test = _drawn_for_test(root, name, files)
        chosen[name] = [path for path in files if (path in test) == (split == "test")]
    drawn = f"test split drawn: {_TEST_SHARE:.0%} of each class, by file name, seed {_SPLIT_SEED}"
    return _image_set(chosen, ignored, drawn)


def _require_no_splits_below(root: Path) -> None:
    """A folder of classes whose folders have splits: one folder too high, or classes above splits."""
    for name, place in _class_folders(root).items():
        splits = _split_folders(place, "train", "test")
        if splits:
            names = " and ".join(folder.name for folder in splits)
            raise DataError(
                f"{root} would be read as one folder for each class, but {place} has the folder {names}.",
                remedy=f"If {name} is not a class, pass {place}. Otherwise arrange images as {_LAYOUT}.",
            )


def _drawn_for_test(root: Path, name: str, files: Sequence[Path]) -> set[Path]:
    """At least one of ``files`` and not all of them: those whose names have the smallest digests."""

    def rank(path: Path) -> str:
        place = unicodedata.normalize("NFC", path.relative_to(root).as_posix())
        return hashlib.sha256(f"{_SPLIT_SEED}\0{name}\0{place}".encode(errors="surrogateescape")).hexdigest()

    return set(sorted(files, key=rank)[: max(1, round(_TEST_SHARE * len(files)))])


def described(splits: Mapping[str, ImageSet]) -> str:
    """One line on opened splits by name: their images, the number of classes and the files that were ignored."""
    counts = [f"{len(images)} {name}" for name, images in splits.items()]
    classes = len(next(iter(splits.values())).classes)
    # Splits that are drawn have the same folders.
    ignored = Counter(map(_kind, {path for images in splits.values() for path in images.ignored}))
    kinds = f" ({', '.join(f'{kind} {count}' for kind, count in sorted(ignored.items()))})" if ignored else ""
    line = f"{' and '.join(counts)} images, {classes} classes, {ignored.total()} files ignored{kinds}"
    drawn = [images.drawn for images in splits.values() if images.drawn]
    unread = [folder for images in splits.values() for folder in images.unread]
    notes = [f"not read: {', '.join(dict.fromkeys(unread))}"] if unread else []
    return "; ".join([line, *dict.fromkeys(drawn), *notes, *_similar_classes(next(iter(splits.values())).classes)])


def _similar_classes(classes: Sequence[str]) -> list[str]:
    """A note on classes whose names differ only in case: letters may be meant, or one class was named twice."""
    by_name: dict[str, list[str]] = {}
    for name in classes:
        by_name.setdefault(name.casefold().strip(), []).append(name)
    pairs = [" and ".join(map(repr, names)) for names in by_name.values() if len(names) > 1]
    more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    return [f"classes with nearly the same name: {', '.join(pairs[:3])}{more}"] if pairs else []


def _kind(ignored: Path) -> str:
    suffix = ignored.suffix.lower()
    return f"{suffix} outside of the class folders" if suffix in SUFFIXES else suffix or "no suffix"


def spread(total: int, count: int) -> list[int]:
    """``count`` indices evenly spread over ``total``, or all of them, so that a sorted set contributes every class."""
    return [int(index) for index in np.linspace(0, total - 1, min(count, total)).round()]


def dataset_digest(
    spec: DatasetSpec, memory: Path, report: Callable[[str], None] = lambda _: None, *, trains: bool = True
) -> str:
    """sha256 of both splits of a data set. It is cached in ``memory`` by the names, sizes and times of the files.

    ``trains=False`` is for a network that is only evaluated: a folder without training images then counts by its test
    split alone. ``report`` gets the line of ``described``, and a line on images that are not shown as they are stored
    if there are any. Raises ``DataError`` with all files that are no readable images.
    """
    _require_known(spec.name)
    try:
        opened = None if _is_array(spec) else _opened(spec, trains=trains)
    except DataError as error:
        raise _with_all_images(spec, error) from error
    files = (
        source_files(spec) if opened is None else sorted(path for images in opened.values() for path in images.files)
    )
    listing = digest(
        {
            "name": spec.name.partition(":")[0],
            "versions": tool_versions("scikit-learn", "pillow"),
            "files": _listing(files),
            # Versions before did not decode the images.
            "decoded": True,
        }
    )
    cached = memory / f"{listing}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(cached.read_text())
        value, line, shown = str(kept["sha256"]), str(kept["described"]), str(kept["shown"])
        report(line if opened is None else described(opened))
        _report_any(shown, report)
        return value
    splits = opened or _open_both(spec)
    line = described(splits)
    report(line)
    classes = splits["test"].classes
    if len(classes) < 2:
        raise DataError(
            f"The data set has one class, {classes[0]}: there is nothing to tell apart.",
            remedy=f"Arrange images as {_LAYOUT}, with a folder for each class. If the classes are the folders in "
            f"{classes[0]}, pass that folder.",
        )
    shown = _shown_differently(_require_readable(files if opened else []))
    _report_any(shown, report)
    value = digest([images.fingerprint() for images in splits.values()])
    memory.mkdir(parents=True, exist_ok=True)
    write_text(cached, json.dumps({"sha256": value, "described": line, "shown": shown}))
    return value


def _open_both(spec: DatasetSpec) -> dict[str, ImageSet]:
    return {"training": open_dataset(spec, "train"), "test": open_dataset(spec, "test")}


def _with_all_images(spec: DatasetSpec, error: DataError) -> DataError:
    """``error`` of a folder that cannot be opened; with all images that cannot be used, if it is about some of them."""
    root = _folder_of(spec)
    folders = [folder for split in ("train", "test") if (folder := _split_folder(root, split)) is not None]
    try:
        scans = [_scanned(folder) for folder in folders or [root]]
    except (DataError, OSError):
        return error
    problems = [problem for scan in scans for problem in scan.problems]
    if not problems:
        return error
    files = [path for scan in scans for images in scan.images.values() for path in images]
    found = [each for each in _checked(sorted(files)) if isinstance(each, str)]
    return _unusable(sorted([*problems, *found]), len(files) + len(problems))


def _folder_of(spec: DatasetSpec) -> Path:
    return Path(spec.name.removeprefix("folder:")) if spec.name.startswith("folder:") else Path(spec.root)


def _opened(spec: DatasetSpec, *, trains: bool) -> dict[str, ImageSet]:
    root = _folder_of(spec)
    if not trains and has_stored_splits(root) and _split_folder(root, "train") is None:
        return {"test": open_dataset(spec, "test")}
    return _open_both(spec)


def _report_any(line: str, report: Callable[[str], None]) -> None:
    if line:
        report(line)


def _shown_differently(facts: Sequence[ImageFacts]) -> str:
    """One line on the images that viewers do not show as they are stored; empty if there are none."""
    counts = {
        "an EXIF orientation": sum(each.orientation != 1 for each in facts),
        "transparency": sum(each.transparency for each in facts),
    }
    found = ", ".join(f"with {what}: {count}" for what, count in counts.items() if count)
    return f"images {found} (docs/preprocessing.md says how they are shown)" if found else ""


def _require_readable(files: Sequence[Path]) -> list[ImageFacts]:
    """Decode each image file once, so that a damaged one is found now and not in the middle of a training."""
    found = _checked(files)
    problems = [each for each in found if isinstance(each, str)]
    if problems:
        raise _unusable(problems, len(files))
    return [each for each in found if not isinstance(each, str)]


def _checked(files: Sequence[Path]) -> list[ImageFacts | str]:
    """How each image file is shown, or why it cannot be used."""

    def checked(path: Path) -> ImageFacts | str:
        try:
            return check_image(path)
        except DataError as error:
            return error.message

    # Decoding needs no more threads than processors, and the memory of an image in each.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(checked, files))


def _listing(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    entries = []
    for path in files:
        try:
            status = path.stat()
        # A broken link, or one to itself; reading the image reports it.
        except OSError:
            continue
        entries.append((str(path.absolute()), status.st_size, status.st_mtime_ns))
    return entries
