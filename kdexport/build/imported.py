"""Turns a network of another origin into a checkpoint: exported, compared with itself, stored without its code."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdexport.checkpoint import StudentSpec, TrainedStudent, open_checkpoint
from kdexport.core.digests import digest, sha256_file, tool_versions
from kdexport.core.files import scratch_folder
from kdexport.data.datasets import ImageSet, spread
from kdexport.data.preprocessing import Preprocessing
from kdexport.data.preprocessing_settings import PreprocessingSettings, apply_settings
from kdexport.errors import CheckpointError, ConfigError, ReparamError, first_line
from kdexport.origins.references import Reference, weights_file
from kdexport.workspace import Making, Step, Workspace

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

    from kdexport.origins.networks import ImportedNetwork

#: What most published classifiers were trained with; used, and said, where a network says nothing of its own.
_SIZE, _CROP = 224, 0.875
#: Images that the top-1 is measured on, and those of one pass.
_JUDGED, _CHUNK = 1000, 64
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: The value of ``weights`` for a factory that returns a trained network.
OWN_WEIGHTS = "own"
_LIBRARIES = ("torch", "torchvision", "timm")
#: How much logits may differ, of the largest, between an image alone and in a batch.
_DEPENDENT = 1e-3


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


def import_student(
    request: ImportRequest, workspace: Workspace, say: Callable[[str], None], *, fresh: bool = False
) -> TrainedStudent:
    """The checkpoint of the network, in ``workspace``; ``say`` gets what was done to the network and its weights.

    A network of a library or of a .pt2 file is made once. A factory is called each time, because nothing tells which
    files it reads; its checkpoint lies under the digest of its content. With ``fresh`` an earlier result is removed.
    Raises ``ConfigError`` for weights that the reference cannot have, ``CheckpointError`` for weights of other classes,
    and ``ReparamError`` for a network that cannot be exported as what it computes.
    """
    _require_weights_of_kind(request)
    if request.reference.kind == "factory":
        folder = _made_anew(request, workspace)
    else:
        step = imported(request)
        if fresh:
            workspace.forget(step.stage, step.key)
        folder = step.result(workspace)
    trained = open_checkpoint(folder)
    for note in trained.spec.provenance["origin"]["notes"]:
        say(f"{request.reference.label}: {note}")
    return trained


def imported(request: ImportRequest) -> Step[Path]:
    """The checkpoint of a network of a library or of a .pt2 file."""
    files = [Path(request.reference.name)] if request.reference.kind == "program" else []
    files += [file] if (file := weights_file(request.weights)) is not None else []
    made_of = (
        request.reference.label,
        # A missing file is refused when the network is made.
        [sha256_file(file) if file.is_file() else "" for file in files],
        Path(request.weights).name,
        list(request.classes),
        request.preprocessing.model_dump(mode="json"),
        request.output,
        dict(request.provenance),
    )

    def make(making: Making) -> None:
        _import(request, making.folder)

    return Step(stage="import", made_of=made_of, tools=_LIBRARIES, make=make, read=lambda folder: folder)


def _made_anew(request: ImportRequest, workspace: Workspace) -> Path:
    with scratch_folder("import") as scratch:
        folder = scratch / "student"
        folder.mkdir()
        _import(request, folder)
        key = digest(["import", *(sha256_file(path) for path in sorted(folder.iterdir()))])
        # The temporary folder may be on another disk.
        return workspace.produce("import", key, lambda made: _copy(folder, made))


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


def _import(request: ImportRequest, folder: Path) -> None:
    from kdexport.origins.networks import import_network

    own = request.weights == OWN_WEIGHTS or request.reference.kind == "program"
    # What the code of a network prints is not a result of the command.
    with contextlib.redirect_stdout(sys.stderr):
        network = import_network(
            request.reference,
            num_classes=len(request.classes),
            image_size=request.preprocessing.image_size,
            weights=None if own else request.weights,
        )
        _store(request, network, folder)


def _require_weights_of_kind(request: ImportRequest) -> None:
    """Raise ``ConfigError`` for weights that would not be used, or for a network of a library without any."""
    kind, own = request.reference.kind, request.weights == OWN_WEIGHTS
    if kind == "program" and not own:
        raise ConfigError(
            f"--weights {request.weights} was given with {request.reference.label}, which contains its weights.",
            remedy="Leave out --weights. For other weights, pass a factory of the network.",
        )
    if kind in ("torchvision", "timm") and own:
        raise ConfigError(
            f"--weights own is for a factory that returns a trained network; {request.reference.label} would have "
            "random weights.",
            remedy="Pass a file of weights, DEFAULT, or a name of the library's weights.",
        )


def _preprocessing(request: ImportRequest, network: "ImportedNetwork") -> tuple[Preprocessing, tuple[str, ...]]:
    """What images are prepared with, and a note if a part of it was taken for granted."""
    base, notes = network.preprocessing, list[str]()
    if base is None:
        size = _size(request, network)
        base = Preprocessing.for_new_student(image_size=size, resize=round(size / _CROP), mean=_MEAN, std=_STD)
        missing = {"image_size", "mean", "std"} - request.preprocessing.model_fields_set
        if missing:
            taken = {"image_size": f"{size} pixels of {base.resize}", "mean": f"mean {_MEAN}", "std": f"std {_STD}"}
            notes.append(
                "says nothing of its preprocessing; that of ImageNet is taken: "
                f"{', '.join(taken[key] for key in taken if key in missing)}. Set [preprocessing] in the export "
                "configuration if it was trained otherwise"
            )
    chosen = request.preprocessing.model_copy(update={"image_size": None}) if network.preprocessing else None
    return apply_settings(chosen or request.preprocessing, base), tuple(notes)


def _size(request: ImportRequest, network: "ImportedNetwork") -> int:
    """The side of the images, in pixels; ``ConfigError`` if it is not the one that a program was exported for."""
    chosen, fixed = request.preprocessing.image_size, _size_of_program(network)
    if chosen is not None and fixed is not None and chosen != fixed:
        raise ConfigError(
            f"{request.reference.label} was exported for images of {fixed} pixels; image_size is {chosen}.",
            remedy=f"Leave out --image-size, or export the network again for {chosen} pixels.",
        )
    return chosen or fixed or _SIZE


def _size_of_program(network: "ImportedNetwork") -> int | None:
    """The side of the images that an exported program takes, if they are squares of a fixed size."""
    graph = getattr(network.module, "graph", None)
    shapes = [] if graph is None else [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    sizes: tuple[Any, ...] = tuple(getattr(shapes[0], "shape", ()))[2:] if len(shapes) == 1 else ()
    square = len(sizes) == 2 and sizes[0] == sizes[1] and isinstance(sizes[0], int)
    return int(sizes[0]) if square else None


def _store(request: ImportRequest, network: "ImportedNetwork", folder: Path) -> None:
    import torch

    from kdexport.checkpoint import save_program_checkpoint
    from kdexport.reparam.program import original_graph

    preprocessing, notes = _preprocessing(request, network)
    size = preprocessing.image_size
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    module = _one_output(network.module, example, request)
    graph = original_graph(module, example)
    _refuse_sigmoid(graph, request)
    _require_independent(module, example, request)
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
                "notes": [*network.notes, *notes],
                "versions": tool_versions(*_LIBRARIES),
            },
        },
    )
    save_program_checkpoint(folder, graph, spec)


def _one_output(module: "nn.Module", images: "Tensor", request: ImportRequest) -> "nn.Module":
    """``module`` with the logits (N,K) as its only output; raises ``ReparamError`` where they are not found."""
    from kdexport.origins.outputs import OneOutput, choose_output

    path = choose_output(_run(module, images, request), request.output, request.reference.label)
    chosen = OneOutput(module, path) if path else module
    _require_logits(_run(chosen, images, request), request)
    return chosen.eval()


def _run(module: "nn.Module", images: "Tensor", request: ImportRequest) -> Any:
    import torch

    try:
        with torch.no_grad():
            return module(images)
    # The network's own code runs here, and may raise anything.
    except Exception as error:
        raise ReparamError(
            f"{request.reference.label} cannot be run on images {tuple(images.shape)}: {type(error).__name__}: "
            f"{first_line(error)}",
            remedy="Pass --image-size, or image_size under [preprocessing]; the network must take any batch of RGB "
            "images (N,3,S,S).",
        ) from error


def _require_logits(logits: "Tensor", request: ImportRequest) -> None:
    label, shape, classes = request.reference.label, tuple(logits.shape), len(request.classes)
    if len(shape) > 2 and shape[0] == 2 and set(shape[2:]) == {1}:
        raise ReparamError(
            f"{label} returns values of shape {shape} for 2 images; logits have the shape (2, classes).",
            remedy="Return x.flatten(1) from forward().",
        )
    if len(shape) != 2 or shape[0] != 2 or not logits.is_floating_point():
        kind = str(logits.dtype).removeprefix("torch.")
        raise ReparamError(
            f"{label} returns {kind} values of shape {shape} for 2 images; logits are float32 of shape (2, classes).",
            remedy="Return logits from forward(): pool and flatten features first, and leave out argmax.",
        )
    if shape[1] != classes:
        raise CheckpointError(
            f"{label} has {shape[1]} classes, the data set has {classes} ({_named(request.classes)}).",
            remedy="Pass --data with the data set that the network was trained on, or fine-tune the network on this "
            "one: leave out --weights and set weights under [student] of the recipe.",
        )
    if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
        raise _probabilities(label, "their sum is 1")


def _refuse_sigmoid(graph: "fx.GraphModule", request: ImportRequest) -> None:
    import torch

    last = graph.graph.output_node().all_input_nodes
    if [node.target for node in last] == [torch.ops.aten.sigmoid.default]:
        raise _probabilities(request.reference.label, "its last operator is a sigmoid")


def _probabilities(label: str, reason: str) -> ReparamError:
    return ReparamError(
        f"{label} returns probabilities, not logits: {reason}.",
        remedy="Return the values before softmax or sigmoid from forward(); the server computes probabilities itself.",
    )


def _require_independent(module: "nn.Module", images: "Tensor", request: ImportRequest) -> None:
    """Raise ``ReparamError`` if the logits of an image depend on the other images of its batch."""
    import torch

    logits = _run(module, images, request)
    alone = torch.cat([_run(module, image[None], request) for image in images])
    difference = float((logits - alone).abs().max()) / max(float(logits.abs().max()), 1e-30)
    # Another batch rounds in another order, by about 1e-6.
    if difference > _DEPENDENT:
        raise ReparamError(
            f"{request.reference.label} returns other logits for an image alone than for the same image in a batch of "
            f"2: they differ by {difference:.1g} of the largest (up to {_DEPENDENT:g} allowed).",
            remedy="Compute nothing over the batch in forward(): no batch statistics, and no maximum over all images.",
        )


def _named(classes: Sequence[str]) -> str:
    shown = ", ".join(classes[:3])
    return f"{shown} and {len(classes) - 3} more" if len(classes) > 3 else shown
