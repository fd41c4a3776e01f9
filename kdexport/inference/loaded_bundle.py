"""A bundle that is opened to classify images with one of its targets, in the target's own runtime."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import Runner
from kdexport.bundle.manifest import Manifest
from kdexport.data.datasets import described
from kdexport.errors import BackendUnavailableError, DataError, VerificationError
from kdexport.gate.accuracy import labelled_images
from kdexport.gate.arms import Artifact, artifact, choose_target, open_bundle
from kdexport.inference.given_images import GivenImage, Images, given_images
from kdexport.stats.logits import probabilities_of
from kdexport.stats.scores import Scores, score
from kdexport.targets import parse_target

if TYPE_CHECKING:
    from kdexport.verify.verdict import Verdict

_BATCH = 16
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The answer to one image: ``ranking`` has (label, probability) of the most probable classes, best first."""

    source: str
    ranking: tuple[tuple[str, float], ...]
    logits: NDArray[np.float32] = field(repr=False)

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.ranking[0][0]

    @property
    def probability(self) -> float:
        """The probability of the most probable class."""
        return self.ranking[0][1]

    def to_json(self) -> dict[str, Any]:
        """A JSON object without the logits."""
        ranking = [{"label": label, "probability": probability} for label, probability in self.ranking]
        return {"source": self.source, "label": self.label, "probability": self.probability, "ranking": ranking}


@dataclass(frozen=True, slots=True)
class RefusedImage:
    """An image that could not be read, and why."""

    source: str
    error: DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The scores of a target on labelled images; ``refused`` are images that could not be read and do not count."""

    target: str
    execution: str
    source: str
    scores: Scores
    refused: tuple[RefusedImage, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        refused = [{"source": item.source, "reason": item.error.message} for item in self.refused]
        named = {"target": self.target, "execution": self.execution, "data": self.source, "refused": refused}
        return {**named, **self.scores.to_json()}


class LoadedBundle:
    """A verified bundle whose files are those of its manifest; its target is opened on the first image.

    ``target`` is onnx-fp32 unless another one of the bundle is named; with ``threads`` 0 the runtime chooses their
    number. Raises ``BundleError`` for a bundle that was changed or not verified, ``UnknownNameError`` for a target that
    it does not have, and ``BackendUnavailableError`` for one that this machine cannot run.
    """

    def __init__(self, folder: str | Path, *, target: str | None = None, threads: int = 0) -> None:
        self._bundle = open_bundle(Path(folder))
        self.target = choose_target(self._bundle, target)
        self._threads = threads
        missing = parse_target(self.target).not_executable()
        if missing is not None:
            raise BackendUnavailableError(
                f"{self.target} cannot run on this machine: {missing.reason}.", remedy=f"{missing.remedy}."
            )

    def __repr__(self) -> str:
        return f"LoadedBundle({str(self.folder)!r}, target={self.target!r}): {len(self.classes)} classes"

    @property
    def folder(self) -> Path:
        """The folder of the bundle."""
        return self._bundle.folder

    @property
    def manifest(self) -> Manifest:
        """Everything that the bundle says about itself."""
        return self._bundle.manifest

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""
        return self.manifest.spec.classes

    @functools.cached_property
    def _runner(self) -> Runner:
        # A served file needs no scratch folder; only the unfused student would be written there.
        found: Artifact = artifact(self._bundle, self.target, "fused", self.folder)
        target = parse_target(self.target)
        return target.runtime.open(found.model, target.precision, threads=self._threads)

    def predict(self, images: Images, *, top: int = 5) -> list[Prediction]:
        """Classify a file, a folder, an image of Pillow, pixels (H,W,3) uint8, or several of these.

        One prediction for each image, in order; each has the ``top`` most probable classes. Raises ``DataError`` with
        the name of the first image that cannot be read; ``predict_each`` continues after it.
        """
        found = []
        for item in self.predict_each(images, top=top):
            if isinstance(item, RefusedImage):
                raise item.error
            found.append(item)
        return found

    def predict_each(self, images: Images, *, top: int = 5) -> Iterator[Prediction | RefusedImage]:
        """As ``predict``, one after the other, with images that cannot be read in their place."""
        for group in _groups(given_images(images)):
            opened = [self._pixels(item) for item in group]
            pixels = [item for item in opened if not isinstance(item, RefusedImage)]
            answers = iter(self._logits(np.stack(pixels)) if pixels else ())
            for item, given in zip(opened, group, strict=True):
                refused = isinstance(item, RefusedImage)
                yield item if refused else self._prediction(given.source, next(answers), top)  # type: ignore[misc]

    def evaluate(self, data: str | Path, *, progress: Progress = lambda _: None) -> Evaluation:
        """Classify labelled images and score the answers; needs the extra ``stats``.

        ``data`` is a folder of images in class folders, or with a test split (``test``, ``val``), a CIFAR-100 folder,
        or ``digits``. Images that cannot be read are left out and named. Raises ``MismatchError`` for other classes.
        """
        images = labelled_images(self._bundle, str(data), whole=True).images
        progress(described({"labelled": images}))
        names = [str(path) for path in images.files] or [f"image {index}" for index in range(len(images))]
        given = [GivenImage(name, functools.partial(images.image, index)) for index, name in enumerate(names)]
        logits, kept, refused = [], [], []
        for start in range(0, len(given), _BATCH):
            opened = [self._pixels(item) for item in given[start : start + _BATCH]]
            refused += [item for item in opened if isinstance(item, RefusedImage)]
            pixels = [item for item in opened if not isinstance(item, RefusedImage)]
            kept += [start + place for place, item in enumerate(opened) if not isinstance(item, RefusedImage)]
            if pixels:
                logits.append(self._logits(np.stack(pixels)))
            progress(f"{start + len(opened):,} of {len(given):,} images")
        if not kept:
            raise DataError(f"None of the {len(given)} images of {data} can be read.", remedy=refused[0].error.message)
        scores = score(np.concatenate(logits), images.labels[kept], self.classes)
        return Evaluation(
            target=self.target, execution=str(self._runner.execution), source=str(data), scores=scores,
            refused=tuple(refused),
        )  # fmt: skip

    def verify(self, *, progress: Progress = lambda _: None) -> "Verdict":
        """Check the whole bundle again, as ``kdexport verify``; needs the extra ``build``."""
        from kdexport.verify.verdict import replay

        return replay(self.folder, self.manifest, progress)

    def _pixels(self, item: GivenImage) -> NDArray[np.uint8] | RefusedImage:
        try:
            return self.manifest.spec.preprocessing.pixels(item.open())
        except DataError as error:
            return RefusedImage(item.source, error)

    def _logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        export, count = self.manifest.data["export"], len(pixels)
        # A target that was built for larger batches gets the last image several times.
        missing = max(int(export["min_batch"]) - count, 0)
        filled = np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)])
        images = self.manifest.spec.preprocessing.normalise(filled)
        logits = self._runner.run(images, (min(int(export["max_batch"]), len(filled)),))[:count]
        if not np.isfinite(logits).all():
            raise VerificationError(
                f"{self.target} of {self.folder} computes logits that are not finite.",
                remedy=f"Run kdexport verify {self.folder} for details.",
            )
        return logits

    def _prediction(self, source: str, logits: NDArray[np.float32], top: int) -> Prediction:
        probabilities = probabilities_of(logits)
        # Stable, so that the first of several equal classes is first, as in argmax.
        best = np.argsort(-logits, kind="stable")[: max(top, 1)]
        return Prediction(source, tuple((self.classes[i], float(probabilities[i])) for i in best), logits)


def _groups(items: Iterable[GivenImage]) -> Iterator[list[GivenImage]]:
    group: list[GivenImage] = []
    for item in items:
        group.append(item)
        if len(group) == _BATCH:
            yield group
            group = []
    if group:
        yield group
