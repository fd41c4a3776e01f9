"""Teachers and students around networks of other libraries and of the user."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from kdexport.students import Host, Student, Tapped
from training.foreign.plan import Plan, plan_of
from training.foreign.probe import BATCH, probe, require_logits, trained_output
from training.teachers import Teacher


class _Readings:
    """What hooks read in one forward pass."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, list[Tensor]] = {}

    def note_output(self, path: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.outputs[path] = output

    def note_input(self, path: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.inputs.setdefault(path, []).append(inputs[0])


@contextmanager
def _reading(network: nn.Module, plan: Plan) -> Iterator[_Readings]:
    """Hooks on the modules that ``plan`` reads; set at each pass, because branches replace modules."""
    readings = _Readings()
    inputs = {tap.preactivation[0] for tap in plan.taps if tap.preactivation is not None} | {plan.classifier} - {""}
    handles = [
        network.get_submodule(tap.path).register_forward_hook(functools.partial(readings.note_output, tap.path))
        for tap in plan.taps
    ]
    handles += [
        network.get_submodule(path).register_forward_pre_hook(functools.partial(readings.note_input, path))
        for path in sorted(inputs)
    ]
    try:
        yield readings
    finally:
        for handle in handles:
            handle.remove()


def _tapped(network: nn.Module, plan: Plan, images: Tensor, name: str) -> Tapped:
    with _reading(network, plan) as readings:
        logits = network(images)
    require_logits(logits, len(images), name)
    features, preactivations = {}, {}
    for tap in plan.taps:
        feature = tap.form.feature(readings.outputs[tap.path])
        features[tap.tap.name] = feature
        if tap.preactivation is not None:
            path, index = tap.preactivation
            preactivations[tap.tap.name] = tap.form.feature(readings.inputs[path][index])
        elif not tap.hidden:
            preactivations[tap.tap.name] = feature
    pooled = readings.inputs[plan.classifier][0].flatten(1) if plan.classifier else logits.new_zeros(len(images), 0)
    return Tapped(features=features, preactivations=preactivations, pooled=pooled, logits=logits)


def _without_changes_in_place(network: nn.Module) -> None:
    # The output of a tap would otherwise be that of the activation after it.
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            cast(Any, module).inplace = False


class ForeignTeacher(Teacher):
    """A teacher around a network that is called as it is; ``plan`` says what is read of it."""

    traceable = False

    def __init__(self, network: nn.Module, taps: Mapping[str, str], *, image_size: int, name: str) -> None:
        """Raises ``ConfigError`` if the network fails on images of this size, or a tap cannot be read."""
        super().__init__()
        _without_changes_in_place(network)
        self.network, self._name, self.image_size = network, name, image_size
        self.plan = plan_of(probe(network, image_size, f"The teacher {name}"), taps)
        self.num_classes = self.plan.num_classes
        self.taps = tuple(tap.tap for tap in self.plan.taps)
        self.classifier_path = f"network.{self.plan.classifier}" if self.plan.classifier else ""

    def tapped(self, images: Tensor) -> Tapped:
        return _tapped(self.network, self.plan, images, f"The teacher {self._name}")

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.network(images))

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.get_submodule(self.classifier_path)(pooled))


def _inside(host: Host) -> Host:
    return Host(tap=host.tap, conv=f"network.{host.conv}", batch_norm=f"network.{host.batch_norm}")


class ForeignStudent(Student):
    """A student around a network that is called as it is; branches replace convolutions of it (placement R1)."""

    def __init__(self, network: nn.Module, taps: Mapping[str, str], *, image_size: int, name: str) -> None:
        """Raises ``ConfigError`` if the network fails on images of this size, or a tap cannot be read."""
        super().__init__()
        _without_changes_in_place(network)
        title = f"The student {name}"
        self.plan = plan_of(probe(network, image_size, title), taps)
        require_logits(trained_output(network, image_size), BATCH, f"{title}, in training mode,")
        self.network = network
        hosts = [tap.host for tap in self.plan.taps if tap.host is not None]
        self.describe(
            num_classes=self.plan.num_classes,
            image_size=image_size,
            taps=[tap.tap for tap in self.plan.taps],
            hosts=[_inside(host) for host in hosts],
            classifier_path=f"network.{self.plan.classifier}" if self.plan.classifier else "",
        )
        cast(Any, self).name = name

    def init_branch(self, conv: nn.Conv2d) -> None:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def tapped(self, images: Tensor) -> Tapped:
        return _tapped(self.network, self.plan, images, f"The student {self.name}")

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.network(images))

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.get_submodule(self.classifier_path)(pooled))
