"""Makes the network of a reference, with its weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import ConfigError, ReparamError
from kdexport.origins import libraries
from kdexport.origins.factories import call_factory
from kdexport.origins.program_archive import open_archive
from kdexport.origins.references import Reference, weights_file
from kdexport.origins.weights import Head, Weights, load_weights, read_weights


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImportedNetwork:
    """A network in evaluation mode on the CPU, as its library or factory made it.

    ``preprocessing`` is what its library says about it, None if nothing is known. ``weights_sha256`` is the digest of
    the file of weights, empty without one. ``notes`` say what was done to make it usable, one clause each.
    """

    module: nn.Module
    preprocessing: Preprocessing | None
    weights_sha256: str = ""
    notes: tuple[str, ...] = ()


def import_network(
    reference: Reference,
    *,
    num_classes: int | None,
    image_size: int | None = None,
    weights: str | None = None,
    head: Head = "strict",
    read: Weights | None = None,
) -> ImportedNetwork:
    """Make the network of ``reference`` with ``weights``: a file, the name of a library's weights, or None for fresh.

    ``num_classes`` is ignored where a library's own weights are loaded into their own classifier; ``head="fresh"``
    replaces that classifier by a fresh one of ``num_classes``. ``read`` is what the file ``weights`` has, if it was
    read before. Raises ``ConfigError`` or ``UnknownNameError`` for a network that cannot be made, ``CheckpointError``
    for weights that do not fit, and ``BackendUnavailableError`` for a library that is not installed.
    """
    file = weights_file(weights)
    named = None if file is not None else weights
    if reference.kind == "torchvision":
        made = libraries.from_torchvision_name(reference.name, num_classes, image_size, named, head)
    elif reference.kind == "timm":
        made = libraries.from_timm_name(reference.name, num_classes, image_size, named, head)
    else:
        if named is not None:
            raise ConfigError(
                f"{reference} has no weights named {named!r}.",
                remedy="Pass the path of a file of weights, or own if the factory returns a trained network; names of "
                "weights belong to torchvision: and timm: networks.",
            )
        made = _own_network(reference, num_classes, image_size)
    found = ImportedNetwork(module=made.module, preprocessing=made.preprocessing, notes=made.notes)
    if file is None:
        return _evaluated(found)
    content = read or read_weights(file)
    notes = load_weights(found.module, content, str(file), head=head)
    return _evaluated(replace(found, weights_sha256=content.sha256, notes=(*found.notes, *content.notes, *notes)))


def _own_network(reference: Reference, num_classes: int | None, image_size: int | None) -> libraries.MadeNetwork:
    if reference.kind == "program":
        return libraries.MadeNetwork(_program_module(Path(reference.name)), None, ())
    return libraries.MadeNetwork(call_factory(reference.name, num_classes=num_classes, image_size=image_size), None, ())


def _program_module(path: Path) -> nn.Module:
    """The module of an archive; raises ``ReparamError`` for a program with a fixed batch."""
    program = open_archive(path).module(check_guards=False)
    # A plain graph of it, without the hooks that check the shapes of inputs. A program has no mode: whether it was
    # exported in training mode is read from its operators.
    module = fx.GraphModule(program, program.graph).eval()
    inputs = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    _require_images(path, inputs)
    batch: Any = inputs[0].shape[0] if len(inputs) == 1 and isinstance(inputs[0], Tensor) and inputs[0].dim() else None
    if batch is None or isinstance(batch, int):
        fact = f"{len(inputs)} inputs" if len(inputs) != 1 else f"a fixed batch of {batch}"
        raise ReparamError(
            f"{path} takes {fact}; a student takes one tensor of images of any batch size.",
            remedy='Export it again with dynamic_shapes=({0: torch.export.Dim("batch", min=1)},).',
        )
    return module


def _require_images(path: Path, inputs: Sequence[Any]) -> None:
    """Raise ``ReparamError`` if the one input of a program is not a batch of square RGB images."""
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        return
    shape = tuple(inputs[0].shape)
    fits = len(shape) == 4 and shape[1] == 3
    sides = shape[2:] if fits else ()
    if not fits or (all(isinstance(side, int) for side in sides) and sides[0] != sides[1]):
        sizes = ", ".join(map(str, ("N", *shape[1:])))
        raise ReparamError(
            f"{path} takes values of shape ({sizes}); a student takes square RGB images (N, 3, S, S).",
            remedy="Export a module whose forward() takes such images and changes them as it needs.",
        )


def _evaluated(network: ImportedNetwork) -> ImportedNetwork:
    """In evaluation mode and float32; what had to be changed is noted."""
    module, notes = network.module, []
    # An exported program has no mode: its graph is that of the mode in which it was exported.
    if not isinstance(module, fx.GraphModule) and any(child.training for child in module.modules()):
        module.eval()
        if network.preprocessing is None:
            # Libraries return every network in training mode.
            notes.append("was in training mode: put into evaluation mode")
    types = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()} - {"float32"}
    if types:
        module.float()
        notes.append(f"weights in {', '.join(sorted(types))}: cast to float32")
    return replace(network, module=module.cpu(), notes=(*network.notes, *notes))
