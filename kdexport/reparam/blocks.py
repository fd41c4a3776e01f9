"""Modules that carry parallel branches while a student is trained."""

import copy
from typing import cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.errors import ConfigError, UnknownNameError
from kdexport.registry import nearest
from kdexport.reparam.branches import Adapters, ParallelBranches
from kdexport.reparam.spec import MAX_BRANCHES, BranchSpec
from kdexport.students.student import Student

__all__ = ["Adapters", "BranchSpec", "ParallelBranches", "attach_branches", "branch_paths"]


def branch_paths(student: Student, spec: BranchSpec) -> dict[str, str]:
    """Where ``attach_branches`` puts branches into ``student``: the path of each ``ParallelBranches`` by layer name."""
    if spec.placement == "R2":
        return {name: f"adapters.{name}" for name in _layer_names(student, spec)}
    hosts = {host.tap: host.conv for host in student.hosts}
    return {name: hosts.get(name, name) for name in _layer_names(student, spec)}


def attach_branches(student: Student, spec: BranchSpec) -> None:
    """Put training branches into ``student``, in place, with fresh weights by the initialisation of the student.

    Raises ``ConfigError`` for a branch count outside 1..16, a layer that the student does not have, and an R2 adapter
    without its channel count; ``ReparamError`` with the reason where the branches could not be folded exactly later.
    """
    if not 1 <= spec.num_branches <= MAX_BRANCHES:
        raise ConfigError(
            f"{spec.num_branches} branches were asked for; 1 to {MAX_BRANCHES} are possible.",
            remedy="Set num_branches in [distiller] of the recipe; the paper's relatives use 3 to 8.",
        )
    paths = branch_paths(student, spec)
    if spec.placement == "R1":
        _branch_hosts(student, list(paths.values()), spec.num_branches)
    else:
        _append_adapters(student, list(paths), spec)


def _layer_names(student: Student, spec: BranchSpec) -> tuple[str, ...]:
    taps = [host.tap for host in student.hosts]
    if isinstance(spec.layers, str):
        choices = {"single": taps[-1:], "multi": taps}
        if spec.layers not in choices:
            raise UnknownNameError(
                f"Branches cannot be attached at {spec.layers!r}.",
                remedy=f"{nearest(spec.layers, choices)} A tuple names single layers.",
            )
        return tuple(choices[spec.layers])
    twice = [name for name in spec.layers if spec.layers.count(name) > 1]
    if twice or not spec.layers:
        raise ConfigError(
            f"Layer {twice[0]} is named twice." if twice else "No layer is named.", remedy="Name each layer once."
        )
    known = [tap.name for tap in student.taps] if spec.placement == "R2" else taps
    for name in spec.layers:
        convolution = spec.placement == "R1" and name in dict(student.named_modules())
        if name not in known and not convolution:
            raise UnknownNameError(
                f"{student.name} has no layer {name!r} for {spec.placement}.", remedy=nearest(name, known)
            )
    return spec.layers


def _branch_hosts(student: Student, conv_paths: list[str], count: int) -> None:
    from kdexport.reparam.structure import batch_norm_after

    # All are found before the first is replaced: a refusal leaves the student as it was.
    for path in conv_paths:
        if not isinstance(student.get_submodule(path), nn.Conv2d):
            raise ConfigError(
                f"{path} of {student.name} is not a convolution, or has branches already.",
                remedy="Attach branches once, to a convolution that a batch norm follows.",
            )
    declared = {host.conv: host.batch_norm for host in student.hosts}
    hosts = {path: declared.get(path) or batch_norm_after(student, path) for path in conv_paths}
    for conv_path, bn_path in hosts.items():
        conv = cast(nn.Conv2d, student.get_submodule(conv_path))
        batch_norm = cast(_BatchNorm, student.get_submodule(bn_path))
        branches = []
        for _ in range(count):
            # Copies keep stride, padding, groups, padding mode, epsilon and momentum, known and unknown ones.
            twin, norm = copy.deepcopy(conv), copy.deepcopy(batch_norm)
            student.init_branch(twin)
            if twin.bias is not None:
                nn.init.zeros_(twin.bias)
            norm.reset_parameters()
            branches.append(nn.Sequential(twin, norm))
        student.set_submodule(conv_path, ParallelBranches(branches))
        student.set_submodule(bn_path, nn.Identity())


def _append_adapters(student: Student, names: list[str], spec: BranchSpec) -> None:
    widths = _adapter_widths(names, spec)
    readers = _readers(student, names)
    channels = {tap.name: tap.channels for tap in student.taps}
    for name, width in widths.items():
        branches = []
        for _ in range(spec.num_branches):
            conv = nn.Conv2d(channels[name], width, 1, bias=False)
            student.init_branch(conv)
            branches.append(nn.Sequential(conv, nn.BatchNorm2d(width)))
        student.adapters[name] = Adapters(branches)
        _widen(student, readers[name], width)


def _adapter_widths(names: list[str], spec: BranchSpec) -> dict[str, int]:
    channels = spec.adapter_channels
    if channels is None:
        raise ConfigError(
            "Placement R2 needs the number of channels that its adapters write.",
            remedy="It is the channel count of the teacher's feature; set adapter_channels.",
        )
    widths = (channels,) * len(names) if isinstance(channels, int) else channels
    if len(widths) != len(names):
        raise ConfigError(
            f"{len(widths)} adapter_channels were given for {len(names)} layers: {', '.join(names)}.",
            remedy="Give one number, or one for each layer in this order.",
        )
    return dict(zip(names, widths, strict=True))


def _readers(student: Student, names: list[str]) -> dict[str, str]:
    """The layer that reads each tap, into which an adapter folds; refused where a fold would not be exact."""
    from kdexport.reparam.structure import ComposeAdapters, find_steps

    trial = copy.deepcopy(student)
    channels = {tap.name: tap.channels for tap in student.taps}
    for name in names:
        trial.adapters[name] = Adapters([nn.Conv2d(channels[name], channels[name], 1, bias=False)])
    steps = [step for step in find_steps(trial.eval()) if isinstance(step, ComposeAdapters)]
    return {step.parallel.removeprefix("adapters."): step.layer for step in steps}


def _widen(student: Student, path: str, inputs: int) -> None:
    # The layer is replaced inside its own container, so that dropout before it stays.
    old = student.get_submodule(path)
    if isinstance(old, nn.Linear):
        fresh: nn.Linear | nn.Conv2d = nn.Linear(inputs, old.out_features, bias=old.bias is not None)
        nn.init.normal_(fresh.weight, std=0.01)
    else:
        conv = cast(nn.Conv2d, old)
        fresh = copy.deepcopy(conv)
        fresh.in_channels = inputs
        fresh.weight = nn.Parameter(conv.weight.new_empty(conv.out_channels, inputs, *conv.kernel_size))
        student.init_branch(fresh)
    if fresh.bias is not None:
        nn.init.zeros_(fresh.bias)
    student.set_submodule(path, fresh)
