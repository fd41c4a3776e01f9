"""What is read of a network without stages: its taps, their pre-activations, its classifier, and hosts of branches."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional

from kdexport.errors import ConfigError
from kdexport.students import Host, Tap
from training.foreign.forms import Form, form_of
from training.foreign.probe import (
    ACTIVATIONS,
    BATCH,
    VIEWS,
    Call,
    Probe,
    is_activation,
    reader_counts,
    through_views,
)

#: Operations between a batch norm and its tap: sums, concatenations and arrangements.
_PASSED = VIEWS | {"AddBackward0", "CatBackward0", "SliceBackward0", "SplitBackward0"}


#: Layers that write (N,C,H,W), and layers that write their channels last.
_MAP_LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.MaxPool2d, nn.GroupNorm)
_VECTOR_LAYERS = (nn.Linear, nn.LayerNorm)


@dataclass(frozen=True, kw_only=True, slots=True)
class TapPlan:
    """How one tap is read: the output of the module ``path``, in its form.

    ``preactivation`` is the activation module and the number of its call whose input is the pre-activation; None if the
    feature has no activation, and both are the same. ``hidden`` is why the pre-activation cannot be read, or empty.
    ``host`` names the convolution and batch norm that write the feature; ``no_host`` is why there are none.
    """

    tap: Tap
    path: str
    form: Form
    preactivation: tuple[str, int] | None
    hidden: str
    host: Host | None
    no_host: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """``classifier`` is the path of the linear layer that writes the logits; empty if there is none.

    ``pools_by_average`` is whether it reads the plain average of the last tap.
    """

    taps: tuple[TapPlan, ...]
    classifier: str
    num_classes: int
    pools_by_average: bool


def plan_of(found: Probe, taps: Mapping[str, str]) -> Plan:
    """Plan the taps (name to module path) of a network that was run once; raises ``ConfigError`` for a wrong one."""
    readers = reader_counts(_ends(found, list(taps.values())))
    planned = tuple(_tap(found, name, path, readers) for name, path in taps.items())
    for before, after in itertools.pairwise(planned):
        if found.order(before.path) >= found.order(after.path):
            raise ConfigError(
                f"The taps are in the wrong order: {before.tap.name} = {before.path!r} is computed after "
                f"{after.tap.name} = {after.path!r}.",
                remedy="List them from shallow to deep.",
            )
    classifier = _classifier(found)
    return Plan(
        taps=planned,
        classifier=classifier,
        num_classes=found.logits.shape[1],
        pools_by_average=bool(classifier and planned) and _averages(found, planned[-1], classifier),
    )


def _ends(found: Probe, paths: list[str]) -> list[Node]:
    nodes = [found.logits.grad_fn, *(call.node for path in paths for call in found.calls.get(path, ()))]
    return [node for node in dict.fromkeys(nodes) if node is not None]


def _tap(found: Probe, name: str, path: str, readers: Mapping[Node, int]) -> TapPlan:
    call = found.only_call(path, f"The tap {name} =")
    prefix = getattr(found.network, "num_prefix_tokens", None)
    prefix = prefix if isinstance(prefix, int) else None
    form = form_of(call.output, BATCH, path, prefix, writes_maps=_writes_maps(found, path))
    if call.output._version != call.version:
        raise ConfigError(
            f"The output of the tap {path!r} is changed in place after the module.",
            remedy="Name the module that computes the final value.",
        )
    stride = form.stride(found.image_size)
    if stride is None:
        raise ConfigError(
            f"The tap {path!r} is a map of {form.side}x{form.side} for images of {found.image_size} pixels, which is "
            "not image size / stride, rounded up, for any stride.",
            remedy="Set an image size that the strides of the network divide.",
        )
    preactivation, hidden, node = _preactivation(found, call)
    host = _host(found, name, path, node, readers)
    return TapPlan(
        tap=Tap(name=name, channels=form.channels, stride=stride),
        path=path,
        form=form,
        preactivation=preactivation,
        hidden=hidden,
        host=host if isinstance(host, Host) else None,
        no_host=host if isinstance(host, str) else "",
    )


def _writes_maps(found: Probe, path: str) -> bool | None:
    """Whether the last layer inside the module ``path`` with a fixed order of axes writes (N,C,H,W)."""
    modules = dict(found.network.named_modules())
    for inner in reversed(found.calls):
        if inner == path or inner.startswith(f"{path}."):
            if isinstance(modules[inner], _MAP_LAYERS):
                return True
            if isinstance(modules[inner], _VECTOR_LAYERS):
                return False
    return None


def _preactivation(found: Probe, call: Call) -> tuple[tuple[str, int] | None, str, Node | None]:
    """Where the pre-activation of a feature is read, why it cannot be, and the node that computes it."""
    modules = dict(found.network.named_modules())
    for path, calls in found.calls.items():
        if isinstance(modules[path], ACTIVATIONS):
            for index, activated in enumerate(calls):
                if activated.node is not None and activated.node is call.node:
                    return (path, index), "", activated.source
    node = through_views(call.node)
    if is_activation(node):
        assert node is not None
        return None, f"it ends with a function ({node.name().removesuffix('Backward0').lower()}), not a module", node
    return None, "", call.node


def _classifier(found: Probe) -> str:
    """The path of the linear layer whose output is the logits; empty if there is none."""
    logits = through_views(found.logits.grad_fn)
    for path, module in found.network.named_modules():
        if not isinstance(module, nn.Linear) or len(found.calls.get(path, ())) != 1:
            continue
        (call,) = found.calls[path]
        same = isinstance(call.output, Tensor) and call.output.numel() == found.logits.numel()
        reads = isinstance(call.given, Tensor) and call.given.numel() == BATCH * module.in_features
        if same and reads and through_views(call.node) is logits:
            return str(path)
    return ""


def _averages(found: Probe, last: TapPlan, classifier: str) -> bool:
    feature = last.form.feature(found.calls[last.path][0].output)
    given = found.calls[classifier][0].given.flatten(1)
    average = functional.adaptive_avg_pool2d(feature, 1).flatten(1)
    return given.shape == average.shape and torch.allclose(given, average, rtol=1e-4, atol=1e-5)


def _host(found: Probe, name: str, path: str, node: Node | None, readers: Mapping[Node, int]) -> Host | str:
    """The pair of a convolution and a batch norm that writes a feature, or why branches cannot take its place."""
    modules = dict(found.network.named_modules())
    written = {
        call.node: norm
        for norm, calls in found.calls.items()
        if isinstance(modules[norm], nn.modules.batchnorm._BatchNorm)
        for call in calls
        if call.node is not None
    }
    # A batch norm with an activation of its own: the activation reads what the batch norm wrote.
    for part, calls in found.calls.items():
        owner = part.rpartition(".")[0]
        if isinstance(modules.get(owner), nn.modules.batchnorm._BatchNorm):
            written |= {call.source: owner for call in calls if call.source is not None}
    reached = _written_by(node, written)
    if not reached:
        return f"no batch norm writes {path!r}"
    # Of a sum, the residual branch, which has more operations before it than the shortcut.
    norm = written[max(reached, key=_count_before)]
    if problem := _unlike_batch_norm(found, norm):
        return problem
    source = found.calls[norm][0].source
    conv = next(
        (
            other
            for other, calls in found.calls.items()
            if isinstance(modules[other], nn.Conv2d) and any(call.node is source for call in calls)
        ),
        None,
    )
    if source is None or conv is None:
        return f"the batch norm {norm!r} does not read a convolution alone"
    return _unlike_convolution(found, conv, readers.get(source, 0)) or Host(tap=name, conv=conv, batch_norm=norm)


def _written_by(node: Node | None, written: Mapping[Node, str]) -> list[Node]:
    """The batch norms before ``node``, through sums, concatenations, arrangements and activations only."""
    reached, seen, pending = [], set(), [node]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in written:
            reached.append(node)
        elif node.name() in _PASSED or is_activation(node):
            pending += [source for source, _ in node.next_functions]
    return reached


def _unlike_batch_norm(found: Probe, path: str) -> str:
    """Why the module ``path`` is not a plain batch norm that runs once; empty if it is one."""
    module: Any = found.network.get_submodule(path)
    extra = [part for part in module.modules() if part is not module and not isinstance(part, nn.Identity)]
    # A batch norm of timm applies its activation itself; without one it is a plain batch norm.
    plain = type(module) is nn.BatchNorm2d or (isinstance(module, nn.BatchNorm2d) and _is_of_timm(module))
    if extra or not plain:
        applied = f", which also applies {type(extra[0]).__name__}" if extra else ""
        return f"{path!r} is a {type(module).__name__}{applied}, not a plain BatchNorm2d"
    if len(found.calls[path]) > 1:
        return f"the batch norm {path!r} runs {len(found.calls[path])} times in a forward pass"
    if module.running_mean is None:
        return f"the batch norm {path!r} keeps no statistics, so it does not fold"
    return ""


def _is_of_timm(module: nn.BatchNorm2d) -> bool:
    """Whether this is timm's batch norm with an activation and a dropout as children."""
    return type(module).__module__.startswith("timm.") and any(True for _ in module.children())


def _unlike_convolution(found: Probe, path: str, readers: int) -> str:
    """Why the module ``path`` is not a plain convolution that only the batch norm reads; empty if it is one."""
    module = found.network.get_submodule(path)
    if type(module) is not nn.Conv2d:
        return f"{path!r} is a {type(module).__name__}, not a plain Conv2d"
    if len(found.calls[path]) > 1:
        return f"the convolution {path!r} runs {len(found.calls[path])} times in a forward pass"
    if readers > 1:
        return f"the output of the convolution {path!r} has {readers} readers, not only the batch norm"
    shared = [name for name, value in found.network.named_parameters(remove_duplicate=False) if value is module.weight]
    return f"the weight of {path!r} is also {shared[0]!r}" if len(shared) > 1 else ""


def _count_before(node: Node) -> int:
    return len(reader_counts([node]))
