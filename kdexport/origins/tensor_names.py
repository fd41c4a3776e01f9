"""Which tensors of a file are those of a network: prefixes, wrappers, classifiers and what else is in the file."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kdexport.errors import CheckpointError
from kdexport.students import Classifier

# Parts that wrappers of torch put into the names of a network.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_USUAL = (*_WRAPPERS, "model", "net", "network", "student", "backbone", "encoder", "classifier", "_forward_module")
# Words in the names of modules that follow the trained one.
_SECOND = {"averaged", "ema", "momentum", "shadow", "swa", "target", "teacher"}
# Counters that profilers (thop) leave in the modules that they measured.
_PROFILED = ("total_ops", "total_params")
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """The tensors of a network by name, and what a file may lack or add."""

    tensors: dict[str, Tensor]
    #: For a name, all names of the same tensor.
    twins: dict[str, tuple[str, ...]]
    #: Buffers that are not stored, such as tables of indices; older files have them.
    recomputed: dict[str, Tensor]
    #: Path of the classifier; empty if it is not known.
    classifier: str

    @classmethod
    def of(cls, module: nn.Module) -> "Network":
        """Describe ``module``."""
        stored = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
        names: dict[int, list[str]] = {}
        for name, value in stored.items():
            names.setdefault(id(value), []).append(name)
        return cls(
            tensors={name: value.detach() for name, value in stored.items()},
            twins={name: tuple(names[id(value)]) for name, value in stored.items()},
            recomputed={name: value for name, value in module.named_buffers() if name not in stored},
            classifier=module.classifier_path if isinstance(module, Classifier) else _last_layer(module),
        )

    def part_of_classifier(self, name: str) -> bool:
        """Whether ``name`` is a tensor of the classifier."""
        return bool(self.classifier) and name.startswith(f"{self.classifier}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How the tensors of a file under ``prefix`` compare with those of a network."""

    prefix: str
    #: The tensors to load, by the name of the network.
    used: dict[str, Tensor]
    #: Counters of batches that the file does not have.
    uncounted: tuple[str, ...]
    #: What differs, one clause each; empty if everything fits.
    problems: tuple[str, ...]
    #: How the classifier differs, if nothing else does.
    head: str | None
    #: Names of the file that are not used.
    ignored: tuple[str, ...]
    #: Parts of wrappers that were removed within names.
    removed: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the weights can be loaded, with or without the classifier."""
        return not self.problems

    @property
    def notes(self) -> tuple[str, ...]:
        """What was renamed and what is not used, one clause each."""
        found = (
            (self.prefix, f"prefix {quoted([self.prefix])} removed"),
            (self.removed, f"{quoted(self.removed)} within names removed"),
            (self.ignored, f"{counted(len(self.ignored), 'other tensor')} not used: {shown(list(self.ignored))}"),
        )
        return tuple(note for present, note in found if present)


def quoted(names: Iterable[str]) -> str:
    """All ``names`` in quotation marks, cut to a readable length."""
    return ", ".join(repr(name if len(name) <= 100 else f"{name[:100]}...") for name in names)


def shown(names: list[str]) -> str:
    """The first three of ``names`` in quotation marks, and how many more there are."""
    return quoted(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def counted(count: int, what: str = "tensor") -> str:
    """``count`` with its noun, in the plural if it is not 1."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def best_fit(network: Network, file: Mapping[str, Tensor], source: str) -> Fit:
    """The tensors of ``file`` that are those of ``network``, whatever prefix their names have.

    A prefix counts only if the names under it are exactly those of the network. If there is none, the result has the
    problems of the most similar one. Raises ``CheckpointError`` if the file holds the network several times.
    """
    fits = [_compared(network, file, prefix) for prefix in _prefixes(network, file)]
    found = _preferred(fits, source)
    if found is not None:
        return found
    inner, removed = _without_inner_wrappers(network, file)
    if removed:
        found = _preferred([_compared(network, inner, prefix) for prefix in _prefixes(network, inner)], source)
        if found is not None:
            return replace(found, removed=removed)
    return fits[0]


def _last_layer(module: nn.Module) -> str:
    layers = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    return layers[-1] if layers else ""


def _prefixes(network: Network, file: Mapping[str, Tensor]) -> list[str]:
    """Prefixes under which at least half of the network's names are in the file, the most likely one first."""
    votes: Counter[str] = Counter({"": 0})
    for name in file:
        start = 0
        while start >= 0:
            if name[start:] in network.tensors:
                votes[name[:start]] += 1
            start = name.find(".", start) + 1 or -1
    enough = [prefix for prefix, count in votes.most_common() if 2 * count >= len(network.tensors)]
    return enough or [votes.most_common(1)[0][0]]


def _compared(network: Network, file: Mapping[str, Tensor], prefix: str) -> Fit:
    inside = {name.removeprefix(prefix): tensor for name, tensor in file.items() if name.startswith(prefix)}
    used = {name: inside[name] for name in network.tensors if name in inside}
    unknown = [name for name in inside if name not in used]
    surplus = {name for name in unknown if _is_surplus(name, inside[name], network)}
    unknown = [name for name in unknown if name not in surplus]
    absent = [name for name in network.tensors if not any(twin in used for twin in network.twins[name])]
    missing = [name for name in absent if not name.endswith(_COUNTER)]
    misshapen = [name for name, tensor in used.items() if tensor.shape != network.tensors[name].shape]
    head = None if unknown else _other_classifier(network, used, missing, misshapen)
    problems = _problems(network, used, missing, unknown, misshapen) if head is None else []
    return Fit(
        prefix=prefix,
        used=used if head is None else {name: tensor for name, tensor in used.items() if name not in misshapen},
        uncounted=tuple(name for name in absent if name.endswith(_COUNTER)),
        problems=(*problems, *_contradictions(network, used)),
        head=head,
        ignored=tuple(name for name in file if not name.startswith(prefix) or name.removeprefix(prefix) in surplus),
    )


def _is_surplus(name: str, tensor: Tensor, network: Network) -> bool:
    """Whether a tensor that the network does not store can be left out without a loss."""
    if name == "n_averaged" or name.rpartition(".")[2] in _PROFILED:
        return True
    own = network.recomputed.get(name)
    return own is not None and _same(own.cpu(), tensor)


def _other_classifier(
    network: Network, used: Mapping[str, Tensor], missing: list[str], misshapen: list[str]
) -> str | None:
    """How the classifier differs; None if it does not, or if it is not all that differs."""
    if missing and not misshapen and all(network.part_of_classifier(name) for name in missing):
        return f"the file has no {quoted(missing)}"
    if missing or not misshapen:
        return None
    # A layer that differs in its number of outputs alone is read by no other layer: that makes it a classifier.
    counts = set()
    for name in misshapen:
        theirs, own = used[name].shape, network.tensors[name].shape
        if len(theirs) != len(own) or not own or theirs[1:] != own[1:]:
            return None
        counts.add((theirs[0], own[0]))
    if len(counts) != 1 or not any(network.part_of_classifier(name) for name in misshapen):
        return None
    ((theirs_count, own_count),) = counts
    name = next((name for name in misshapen if name.endswith("weight")), misshapen[0])
    return f"the file's classifier {name} has {theirs_count} outputs, the network {own_count}"


def _problems(
    network: Network, used: Mapping[str, Tensor], missing: list[str], unknown: list[str], misshapen: list[str]
) -> list[str]:
    shapes = [
        f"{quoted([name])} is {tuple(used[name].shape)}, not {tuple(network.tensors[name].shape)}" for name in misshapen
    ]
    problems = [
        f"{counted(len(names))} {what}: {text}"
        for what, names, text in (
            ("missing", missing, shown(missing)),
            ("unknown", unknown, shown(unknown)),
            ("of another shape", shapes, "; ".join(shapes[:3]) + (" and more" if len(shapes) > 3 else "")),
        )
        if names
    ]
    if missing and unknown:
        near = difflib.get_close_matches(unknown[0], missing, n=1, cutoff=0.6)
        problems += [f"{quoted(unknown[:1])} is nearest to the missing {quoted(near)}"] if near else []
    if any(name.endswith("_flat_param") for name in unknown):
        problems.append("FSDP stored its flat parameters; save it with StateDictType.FULL_STATE_DICT")
    return problems


def _contradictions(network: Network, used: Mapping[str, Tensor]) -> list[str]:
    """Names of one tensor of the network that are different tensors in the file."""
    found = []
    for name, tensor in used.items():
        first = next(twin for twin in network.twins[name] if twin in used)
        if first != name and not _same(used[first], tensor):
            found.append(f"{quoted([first, name])} are one tensor in the network, and differ in the file")
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype and one.layout == other.layout
    # torch compares neither sparse tensors nor those without values.
    return alike and one.layout == torch.strided and not (one.is_meta or other.is_meta) and torch.equal(one, other)


def _preferred(fits: list[Fit], source: str) -> Fit | None:
    """The fit to take: raw weights before averaged ones and those of a teacher; None if nothing fits."""
    fits = sorted((fit for fit in fits if fit.fits), key=_rank)
    if len(fits) > 1 and _rank(fits[0]) == _rank(fits[1]):
        places = [f"{fit.prefix}*" for fit in fits if _rank(fit) == _rank(fits[0])]
        raise CheckpointError(
            f"{source} holds the tensors of this network {len(places)} times: {shown(places)}.",
            remedy="Save the state_dict of the one to use with torch.save, and pass that file.",
        )
    return fits[0] if fits else None


def _rank(fit: Fit) -> tuple[bool, int]:
    usual = all(part in _USUAL for part in fit.prefix.split(".")[:-1])
    kind = 2 if _SECOND.intersection(re.split(r"[._]", fit.prefix)) else 0 if usual else 1
    return fit.head is not None, kind


def _without_inner_wrappers(network: Network, file: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """``file`` without the parts that wrappers of single layers put into names, and these parts."""
    own = {part for name in network.tensors for part in name.split(".")}
    wrappers = {part for part in _WRAPPERS if part not in own}
    renamed: dict[str, Tensor] = {}
    removed: set[str] = set()
    for name, tensor in file.items():
        first, *rest = name.split(".")
        kept = ".".join([first, *(part for part in rest if part not in wrappers)])
        if kept in renamed:
            return {}, ()
        removed.update(wrappers.intersection(rest))
        renamed[kept] = tensor
    return renamed, tuple(sorted(removed))
