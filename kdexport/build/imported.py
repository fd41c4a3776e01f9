"""Turns a network of another origin into a checkpoint: exported, compared with itself, stored without its code."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdexport.checkpoint import StudentSpec, TrainedStudent, open_checkpoint
from kdexport.core.digests import digest, sha256_file, tool_versions
from kdexport.data.datasets import ImageSet, spread
from kdexport.data.preprocessing import Preprocessing
from kdexport.data.preprocessing_settings import PreprocessingSettings, apply_settings
from kdexport.errors import CheckpointError, ReparamError, first_line
from kdexport.origins.references import Reference
from kdexport.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kdexport.origins.networks import ImportedNetwork

#: What most published classifiers were trained with; used, and said, where a network says nothing of its own.
_SIZE, _CROP = 224, 0.875
#: Images that the top-1 is measured on, and those of one pass.
_JUDGED, _CHUNK = 1000, 64
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: The value of ``weights`` for a factory that returns a trained network.
OWN_WEIGHTS = "own"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportRequest:
    """A trained network by reference, and what its bundle needs besides.

    ``weights`` is a file, a name of a library's weights or ``OWN_WEIGHTS``; ``output`` the key or index of the logits
    among several outputs, empty for one; ``classes`` are those of the data set, in the order of the logits.
    """

    reference: Reference
    weights: str
    classes: tuple[str, ...]
    preprocessing: PreprocessingSettings
    output: str = ""
    provenance: Mapping[str, Any]


def import_student(request: ImportRequest, workspace: Workspace, say: Callable[[str], None]) -> TrainedStudent:
    """The checkpoint of the network, in ``workspace`` under the digest of its content; ``say`` gets the changes to it.

    The network is made anew each time, because nothing tells which files a factory reads. Raises ``CheckpointError``
    for weights of other classes and ``ReparamError`` for a network that cannot be exported as what it computes.
    """
    from kdexport.origins.networks import import_network

    own = request.weights == OWN_WEIGHTS or request.reference.kind == "program"
    network = import_network(
        request.reference,
        num_classes=len(request.classes),
        image_size=request.preprocessing.image_size,
        weights=None if own else request.weights,
    )
    for note in network.notes:
        say(f"{request.reference.label}: {note}")
    preprocessing = _preprocessing(request, network, say)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "student"
        _store(request, network, preprocessing, folder)
        key = digest(["import", *(sha256_file(path) for path in sorted(folder.iterdir()))])
        # The temporary folder may be on another disk.
        place = workspace.produce("import", key, lambda made: _copy(folder, made))
    return open_checkpoint(place)


def judge_student(trained: TrainedStudent, images: ImageSet, say: Callable[[str], None]) -> None:
    """Tell ``say`` the top-1 of the network on up to 1,000 images of the validation split, and a warning if it is that
    of a guess or of other classes.

    Everything later compares files with the network, so none of it notices labels in another order or preprocessing
    that the network was not trained with.
    """
    import numpy as np

    from kdexport.checkpoint import load_student
    from kdexport.stats.plausibility import judge
    from kdexport.verify.reference import run_torch

    network, preprocessing = load_student(trained), trained.spec.preprocessing
    chosen = spread(len(images), min(len(images), _JUDGED))
    parts = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
    predictions = [
        run_torch(network, preprocessing.normalise(images.read(part, preprocessing))).argmax(1) for part in parts
    ]
    judgement = judge(np.concatenate(predictions), images.labels[chosen], images.classes)
    say(f"{trained.spec.student}: {judgement}")
    if judgement.problem:
        say(
            f"Warning: {trained.spec.student} cannot have been trained for these classes with this preprocessing: "
            f"{judgement.problem}. The bundle will compute what the network computes; check that the folders of the "
            "data set, sorted by name, are in the order of its outputs, and the table [preprocessing]."
        )


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def _preprocessing(request: ImportRequest, network: "ImportedNetwork", say: Callable[[str], None]) -> Preprocessing:
    base = network.preprocessing
    if base is None:
        size = request.preprocessing.image_size or _size_of_program(network) or _SIZE
        base = Preprocessing.for_new_student(image_size=size, resize=round(size / _CROP), mean=_MEAN, std=_STD)
        missing = {"image_size", "mean", "std"} - request.preprocessing.model_fields_set
        if missing:
            say(
                f"{request.reference.label} says nothing of its preprocessing; taken for {', '.join(sorted(missing))}: "
                f"{size} pixels of {base.resize}, mean {_MEAN}, std {_STD} (ImageNet). Set [preprocessing] in the "
                "export configuration if it was trained otherwise."
            )
    chosen = request.preprocessing.model_copy(update={"image_size": None}) if network.preprocessing else None
    return apply_settings(chosen or request.preprocessing, base)


def _size_of_program(network: "ImportedNetwork") -> int | None:
    """The side of the images that an exported program takes, if they are squares of a fixed size."""
    graph = getattr(network.module, "graph", None)
    shapes = [] if graph is None else [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    sizes: tuple[Any, ...] = tuple(getattr(shapes[0], "shape", ()))[2:] if len(shapes) == 1 else ()
    square = len(sizes) == 2 and sizes[0] == sizes[1] and isinstance(sizes[0], int)
    return int(sizes[0]) if square else None


def _store(
    request: ImportRequest, network: "ImportedNetwork", preprocessing: Preprocessing, folder: Path
) -> StudentSpec:
    import torch

    from kdexport.checkpoint import save_program_checkpoint
    from kdexport.reparam.program import original_graph

    size = preprocessing.image_size
    example = torch.zeros(2, 3, size, size)
    module = _one_output(network.module, example, request)
    graph = original_graph(module, example)
    spec = StudentSpec(
        student=request.reference.label,
        classes=request.classes,
        preprocessing=preprocessing,
        branches=None,
        provenance={
            **request.provenance,
            "origin": {
                "network": request.reference.label,
                "weights": Path(request.weights).name,
                "weights_sha256": network.weights_sha256,
                "notes": list(network.notes),
                "versions": tool_versions("torch", "torchvision", "timm"),
            },
        },
    )
    return save_program_checkpoint(folder, graph, spec)


def _one_output(module: "nn.Module", example: "Tensor", request: ImportRequest) -> "nn.Module":
    """``module`` with the logits (N,K) as its only output; raises ``ReparamError`` where they are not found."""
    import torch

    from kdexport.origins.outputs import OneOutput, choose_output

    with torch.no_grad():
        try:
            found = module(example)
        # The network's own code runs here, and may raise anything.
        except Exception as error:
            raise ReparamError(
                f"{request.reference.label} cannot be run on images {tuple(example.shape)}: {type(error).__name__}: "
                f"{first_line(error)}",
                remedy="Pass --image-size, or image_size under [preprocessing]; the network must take any batch of RGB "
                "images (N,3,S,S).",
            ) from error
    path = choose_output(found, request.output, request.reference.label)
    chosen = OneOutput(module, path) if path else module
    with torch.no_grad():
        logits = chosen(example)
    _require_logits(logits, request)
    return chosen.eval() if path else module


def _require_logits(logits: "Tensor", request: ImportRequest) -> None:
    shape, classes = tuple(logits.shape), len(request.classes)
    if len(shape) != 2 or shape[0] != 2 or not logits.is_floating_point():
        raise ReparamError(
            f"{request.reference.label} returns {logits.dtype} values of shape {shape} for 2 images; logits are "
            "float32 of shape (2, classes).",
            remedy="Return logits from forward(): pool and flatten features first, and leave out argmax.",
        )
    if shape[1] != classes:
        raise CheckpointError(
            f"{request.reference.label} has {shape[1]} classes, the data set has {classes}: {_named(request.classes)}.",
            remedy="Pass --data with the data set that the network was trained on, or fine-tune the network on this "
            "one: leave out --weights and set weights under [student] of the recipe.",
        )


def _named(classes: Sequence[str]) -> str:
    shown = ", ".join(classes[:3])
    return f"{shown}, ..." if len(classes) > 3 else shown
