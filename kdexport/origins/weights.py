"""Files of trained weights as training codes write them: read, unwrapped and loaded strictly."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kdexport.core.digests import sha256_file
from kdexport.errors import CheckpointError
from kdexport.origins.file_formats import unreadable_tensors, weight_format
from kdexport.origins.pickled_tensors import Placeholder, read_pickled
from kdexport.origins.tensor_names import Fit, Network, best_fit, counted, quoted, shown

#: What happens to a classifier of another number of classes: an error, or the network keeps its own.
Head = Literal["strict", "fresh"]

# Where training codes store the weights, most specific first; then the names of averaged weights.
_RAW = (
    *("state_dict", "model_state_dict", "model_state", "model_dict", "net_state_dict", "model", "net", "network"),
    *("module", "params", "student", "student_state_dict", "weights"),
)
_AVERAGED = (
    *("state_dict_ema", "ema_state_dict", "model_ema_state_dict", "model_ema", "ema_model", "ema", "params_ema"),
    *("shadow", "shadow_params", "swa_state_dict", "swa_model"),
)
# What training codes store beside the weights of a model.
_BESIDE = ("optim", "sched", "scaler", "amp", "loss", "criterion", "callbacks", "loops", "rng", "hyper_parameters")
# A pickle can contain itself; no checkpoint is nested as deep as this.
_DEEPEST, _MOST_PARTS = 8, 100
_SAVE = "Save model.state_dict() with torch.save, and pass that file."
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The tensors of a file by name, without the dictionaries around them.

    ``notes`` says what was unwrapped and what was not read, one clause each.
    """

    tensors: dict[str, Tensor]
    sha256: str
    notes: tuple[str, ...]


def read_weights(path: Path) -> Weights:
    """Read ``path``: safetensors, or a file of ``torch.save`` with tensors only; nothing of the file is run.

    Of a checkpoint of a training code, the weights of the model are taken: raw ones before averaged ones (EMA). Raises
    ``CheckpointError`` if there are none, or if the file is of another format, damaged, or contains code.
    """
    if weight_format(path) == "pickle":
        tensors, notes = _unwrapped(read_pickled(path), path)
    else:
        tensors, notes = _safetensors(path), ()
    if not tensors:
        raise CheckpointError(f"{path} contains no tensors.", remedy=_SAVE)
    return Weights(tensors=tensors, sha256=sha256_file(path), notes=notes)


def load_weights(module: nn.Module, weights: Weights, source: str, *, head: Head = "strict") -> tuple[str, ...]:
    """Load ``weights`` into ``module``; returns what was renamed, cast and not used, one clause each.

    A prefix that all names of the network have in the file is removed. ``source`` names the file in errors. Every
    tensor of ``module`` must be in the file, with its shape and finite values, and the file must have no other under
    that prefix; ``num_batches_tracked`` may be missing. With ``head="fresh"``, a classifier of another number of
    classes, or none in the file, leaves that of ``module`` as it is. Raises ``CheckpointError``, and ``module`` is then
    unchanged.
    """
    network = Network.of(module)
    fit = best_fit(network, weights.tensors, source)
    notes = list(fit.notes)
    if not fit.fits:
        raise _misfit(fit, source, weights.notes)
    if fit.head is not None:
        if head == "strict":
            raise _other_head(fit, source)
        notes.append(f"{fit.head}; the network keeps its own")
    used = fit.used
    _require_kind(used, network, source)
    _require_values(used, network, source)
    counters = {name for name, tensor in used.items() if _is_unusable_counter(name, tensor)}
    used = {name: tensor for name, tensor in used.items() if name not in counters}
    if kept := len(fit.uncounted) + len(counters):
        notes.append(f"{kept} num_batches_tracked missing or rounded in the file: those of the network stay")
    notes += _casts(used, network)
    # What is not in the file is copied to itself, so that torch compares all names.
    module.load_state_dict({**module.state_dict(), **used})
    return tuple(notes)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise unreadable_tensors(path, error) from error


def _unwrapped(content: object, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of the model in a checkpoint, and notes on where they were and what is not used."""
    place: list[str] = []
    unused: list[str] = []
    unread: list[str] = []
    level = _by_text(content, path)
    while inner := [name for name in (*_RAW, *_AVERAGED) if _holds_tensors(level.get(name))]:
        if len(place) == _DEEPEST:
            raise CheckpointError(f"{path} has dictionaries nested more than {_DEEPEST} levels deep.", remedy=_SAVE)
        place.append(inner[0])
        unused += inner[1:]
        unread += [name for name in level if name not in inner]
        level = _by_text(level[inner[0]], path)
    found, others = _named_tensors(level)
    if not found:
        raise _no_tensors(level, path)
    averaged = " (averaged weights, EMA)" if any(name in _AVERAGED for name in place) else ""
    notes = (
        (place, f"weights taken from {'/'.join(place)!r}{averaged}"),
        (unused, f"weights under {quoted(unused)} not used"),
        ([*unread, *others], f"not read: {shown([*unread, *others])}"),
    )
    return found, tuple(note for present, note in notes if present)


def _by_text(content: object, path: Path) -> dict[str, object]:
    """The entries of a dictionary whose keys are texts, or the bytes that Python 2 wrote."""
    if not isinstance(content, dict):
        raise _no_dictionary(content, path)
    texts: dict[str, object] = {}
    for key, value in content.items():
        name = key.decode(errors="replace") if isinstance(key, bytes) else key
        if isinstance(name, str) and name not in texts:
            texts[name] = value
        elif isinstance(value, Tensor):
            what = "a second time" if isinstance(name, str) else "which is not a name"
            raise CheckpointError(f"{path} contains a tensor under the key {shown([str(key)])}, {what}.", remedy=_SAVE)
    return texts


def _no_dictionary(content: object, path: Path) -> CheckpointError:
    what = content.origin if isinstance(content, Placeholder) else f"one object of the type {type(content).__name__}"
    return CheckpointError(f"{path} contains {what}, not a dictionary of named tensors.", remedy=_SAVE)


def _holds_tensors(value: object) -> bool:
    """Whether ``value`` is a dictionary with a tensor in it or in one below it."""
    pending: list[object] = [value] if isinstance(value, dict) else []
    seen: set[int] = set()
    while pending:
        entry = pending.pop()
        if isinstance(entry, Tensor):
            return True
        # A pickle can contain itself.
        if isinstance(entry, dict) and id(entry) not in seen:
            seen.add(id(entry))
            pending += entry.values()
    return False


def _named_tensors(level: Mapping[str, object]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a state_dict, or of several in one dictionary, and the names of the other entries."""
    # Not value.detach(): a file can set attributes of its tensors.
    found = {name: Tensor.detach(value) for name, value in level.items() if isinstance(value, Tensor)}
    read = set(found)
    if not any("." in name for name in found):
        # Modules stored one by one, as {"backbone": ..., "head": ...}, or under a name of the author.
        for name, value in level.items():
            if _holds_tensors(value) and not any(part in name.lower() for part in _BESIDE):
                found.update(_flat(value, f"{name}.", set()))
                read.add(name)
    return found, [name for name in level if name not in read]


def _flat(value: object, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(value, dict) or id(value) in seen or len(seen) > _MOST_PARTS:
        return
    seen.add(id(value))
    for key, entry in value.items():
        if isinstance(key, str) and isinstance(entry, Tensor):
            yield prefix + key, Tensor.detach(entry)
        elif isinstance(key, str):
            yield from _flat(entry, f"{prefix}{key}.", seen)


def _no_tensors(level: Mapping[str, object], path: Path) -> CheckpointError:
    arrays = [
        name for name, value in level.items() if isinstance(value, Placeholder) and value.origin.startswith("numpy.")
    ]
    if len(arrays) > 1:
        return CheckpointError(
            f"{path} contains NumPy values, not tensors: {shown(arrays)}.",
            remedy="Convert each with torch.from_numpy, and save them with torch.save.",
        )
    inside = f"; it has {shown(list(level))}" if level else ""
    return CheckpointError(f"{path} contains no named tensors (no state_dict){inside}.", remedy=_SAVE)


def _misfit(fit: Fit, source: str, notes: tuple[str, ...]) -> CheckpointError:
    taken = f" ({notes[0]})" if notes else ""
    return CheckpointError(
        f"{source}{taken} does not fit the network: {'; '.join(fit.problems)}.",
        remedy="Pass weights of the same network, with the same number of classes.",
    )


def _other_head(fit: Fit, source: str) -> CheckpointError:
    return CheckpointError(
        f"{source} has another classifier than the network: {fit.head}.",
        remedy="Pass weights that were trained on these classes.",
    )


def _require_kind(used: Mapping[str, Tensor], network: Network, source: str) -> None:
    """Raise ``CheckpointError`` if a tensor cannot be cast to that of the network without changing its meaning."""
    problems = [
        f"{shown([name])} {problem}"
        for name, tensor in used.items()
        if (problem := _wrong_kind(name, tensor, network.tensors[name])) is not None
    ]
    if problems:
        more = f" ({len(problems)} such tensors)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{source} cannot be loaded: {problems[0]}{more}.",
            remedy="Save the state_dict of the trained float32 network, before it is quantized or compressed.",
        )


def _wrong_kind(name: str, tensor: Tensor, own: Tensor) -> str | None:
    kind = str(tensor.dtype).removeprefix("torch.")
    wanted = str(own.dtype).removeprefix("torch.")
    if tensor.is_meta:
        return "has a shape but no values (it was saved from the meta device)"
    if tensor.is_quantized:
        return f"is quantized ({kind})"
    if tensor.layout != torch.strided:
        return f"is stored in the sparse layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.dtype == own.dtype or name.endswith("num_batches_tracked"):
        return None
    if own.dtype in _FLOATS and tensor.dtype in _FLOATS:
        return None
    exact = not (own.is_floating_point() or own.is_complex() or tensor.is_floating_point() or tensor.is_complex())
    if exact and torch.equal(tensor.to(own.dtype).to(tensor.dtype), tensor):
        return None
    return f"is {kind}, and that of the network is {wanted}"


def _require_values(used: Mapping[str, Tensor], network: Network, source: str) -> None:
    """Raise ``CheckpointError`` for values that are not finite, too large for the network's type, or impossible."""
    remedy = "The training diverged, or the file is damaged: pass an earlier checkpoint."
    bounds = {
        name: [float(bound) for bound in tensor.aminmax()]
        for name, tensor in used.items()
        if tensor.dtype in _FLOATS and tensor.numel() and not name.endswith("num_batches_tracked")
    }
    # A NaN is equal to nothing, and is the minimum and the maximum of its tensor.
    infinite = [name for name, limits in bounds.items() if any(value - value != 0 for value in limits)]
    if infinite:
        raise CheckpointError(
            f"{source} holds NaN or infinite values in {len(infinite)} of {len(used)} tensors: {shown(infinite)}.",
            remedy=remedy,
        )
    for name, (low, high) in bounds.items():
        kind = network.tensors[name].dtype
        if kind in _FLOATS and max(-low, high) > torch.finfo(kind).max:
            raise CheckpointError(
                f"{source} holds values up to {max(-low, high):.3g} in {shown([name])}, more than "
                f"{str(kind).removeprefix('torch.')} can hold.",
                remedy=remedy,
            )
        if name.endswith("running_var") and low < 0:
            raise CheckpointError(f"{source} holds a negative variance ({low:.3g}) in {shown([name])}.", remedy=remedy)


def _is_unusable_counter(name: str, tensor: Tensor) -> bool:
    """Whether a counter of batches was rounded, as ``half()`` of a whole state_dict does."""
    return name.endswith("num_batches_tracked") and (
        tensor.is_floating_point() and not (tensor.isfinite().all() and torch.equal(tensor, tensor.round()))
    )


def _casts(used: Mapping[str, Tensor], network: Network) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for name, tensor in used.items():
        kinds = (str(tensor.dtype), str(network.tensors[name].dtype))
        if kinds[0] != kinds[1]:
            counts[kinds] = counts.get(kinds, 0) + 1
    return [
        f"{counted(count)} cast from {before} to {after}".replace("torch.", "")
        for (before, after), count in counts.items()
    ]
