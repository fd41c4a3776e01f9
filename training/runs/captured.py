"""Whole training steps as one CUDA graph: batches, teacher, student, backward pass and optimiser, started by one call.

A step of a small network is a thousand short kernels, and starting them takes longer than running them. A graph has no
arguments, so everything that differs between steps lies in tables on the device, which are filled once an epoch; the
steps count themselves and take their rows of each. The tables have the numbers of ``training.runs.loop``, in the same
order from the same generators, and the step is the same ``OptimisationStep``.

A graph has several steps. The teacher does not change and treats each image by itself, so the images of all of them are
cropped together, and the teacher reads them together before the first step. It draws no random numbers, so those of
the steps keep their order. Run without a graph, on any device, the steps end with the weights of the loop, up to the
rounding of the teacher in a larger batch and of the gradients of branches that are computed together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.errors import BackendUnavailableError
from kdexport.reparam.branches import ParallelBranches
from kdexport.students import Tapped
from training.data import Batches, EpochDraws, ResidentBatches
from training.distillers.distiller import StepContext
from training.recipe import TrainSettings
from training.runs.joint_branches import branches_together, joinable
from training.runs.step import EpochPlan, OptimisationStep

#: Steps before the capture, at least, in which kernels are chosen and memory is taken; their effect is undone.
_WARM_UPS = 3
#: Steps in a graph: what they share is then a small part of each.
MOST_STEPS = 8
#: Bytes of the images of a graph and of the teacher's outputs for them. If a graph of ``MOST_STEPS`` has more, it has
#: fewer steps: those of large images are long, and gain less.
_AHEAD_BYTES = 512 * 2**20
#: The losses of the first step with and without the graph, in bfloat16, differ by less than this part.
_SAME_LOSS = 0.02
_OFF = "Train without it: --set train.capture=no"


def obstacle(settings: TrainSettings, batches: Batches, accelerator: Accelerator, *, mixes: bool, foreign: str) -> str:
    """Why the steps of a run cannot be, or are not, captured; empty if they are.

    ``foreign`` names what of the run is not of this project, whose code may decide something on the host at each step.
    """
    strange = f"{foreign} is not of this project and may decide on the host (train.capture = 'yes' captures it)"
    reasons = {
        "train.capture is 'no'": settings.capture == "no",
        "there is no CUDA device": accelerator.device.type != "cuda",
        f"{accelerator.num_processes} processes exchange gradients in a step": accelerator.num_processes > 1,
        "the gradient scaler of fp16 is run by the host": accelerator.scaler is not None,
        "its images are decoded or changed one by one by the host": not isinstance(batches, ResidentBatches)
        or batches.erases,
        "train.mixup and train.cutmix are drawn by the host": mixes,
        "train.ema changes its decay at each step": settings.ema > 0,
        strange: bool(foreign) and settings.capture == "auto",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def require_capture(settings: TrainSettings, reason: str) -> None:
    """Raise ``BackendUnavailableError`` if ``settings`` demand a capture that ``reason`` prevents."""
    if settings.capture == "yes" and reason:
        raise BackendUnavailableError(
            f"train.capture = 'yes', but the training step cannot be captured as a CUDA graph: {reason}.",
            remedy="Set train.capture to 'auto'.",
        )


class CapturedSteps:
    """The steps of an epoch as calls without arguments; ``begin`` fills the tables that they read.

    ``plain`` is ``step.task`` before it was compiled. A call makes at most ``most`` steps, which must be 1 if the
    teacher may draw random numbers, or treat an image differently in another batch. Before ``prepare`` it makes one;
    before it, and on a CPU, it runs them from Python.
    """

    def __init__(
        self,
        step: OptimisationStep,
        plain: nn.Module,
        batches: ResidentBatches,
        device: torch.device,
        batch_size: int,
        most: int = MOST_STEPS,
    ) -> None:
        self.step, self._plain, self._batches = step, plain, batches
        self._device, self._batch_size = device, batch_size
        self._tables: _Tables | None = None
        self._first_rows = torch.arange(most, device=device)
        #: The rows of the next steps.
        self._at = self._first_rows.clone()
        #: Their learning rates. Not in the memory of a graph, which others overwrite: the optimiser's state is stored.
        self._rates = torch.zeros(most, device=device)
        self._most, self._length = most, 1
        #: The steps of the epoch that were not started yet.
        self.left = 0
        #: Starts so many steps, by their number.
        self._replays: dict[int, Callable[[], None]] = {}
        #: How often a step calls each batch norm that takes part in ``counting_later``.
        self._norm_calls: dict[_BatchNorm, int] = {}
        #: The layers whose weights autocast would cast.
        self._cast: list[nn.Module] = []
        #: The layers whose branches are computed together.
        self._joint: list[ParallelBranches] = []

    def begin(self, plan: EpochPlan, draws: EpochDraws) -> None:
        """Fill the tables with what an epoch draws, and start at its first step."""
        filled = _Tables.of(plan, draws, self._batch_size)
        if self._tables is None:
            self._tables, self._rates = filled.to(self._device), self._rates.to(plan.rates.dtype)
        else:
            self._tables.copy_(filled)
        self._at.copy_(self._first_rows)
        self.left = len(plan.rates)

    def prepare(self, plan: EpochPlan, draws: EpochDraws, seed: int) -> None:
        """Run some steps, capture them if the device is a GPU, and put everything back to where it was.

        The last steps of an epoch, which are too few for a whole graph, have a smaller one. Raises
        ``BackendUnavailableError`` if a graph cannot be captured, or if it has other losses than its steps.
        """
        self.begin(plan, draws)
        self._plain.train()
        before = _Snapshot.of(self._plain, self.step.optimizer)
        self._look(len(plan.rates))
        pool = None
        with self.counting_later(0):
            for count in filter(None, dict.fromkeys((self._length, len(plan.rates) % self._length))):
                expected = self._first_losses(before, seed, partial(self._warm_up, count))
                if self._device.type == "cuda":
                    before.restore(self.step.optimizer)
                    # What a graph leaves in its memory is read by nothing after it, and no two run at the same time:
                    # the second one works in the memory of the first.
                    graph = _captured(partial(self._body, count), pool)
                    pool = graph.pool()
                    _require_same(self.step.sums.names, expected, self._first_losses(before, seed, graph.replay))
                    self._replays[count] = graph.replay
        before.restore(self.step.optimizer)
        self.left = 0

    def __call__(self) -> int:
        """Run the next steps of the epoch, of which one must be left; returns their number."""
        assert self.left > 0
        count = min(self._length, self.left)
        self._replays.get(count, partial(self._body, count))()
        self.left -= count
        return count

    @contextmanager
    def counting_later(self, steps: int) -> Iterator[None]:
        """Within the block batch norms do not count ``steps`` batches, a kernel for each; they have the count after it.

        One without a momentum counts, because it reads the count.
        """
        counts = {norm: norm.num_batches_tracked for norm in self._norm_calls}
        for norm in counts:
            norm.num_batches_tracked = None
        try:
            yield
        finally:
            for norm, count in counts.items():
                norm.num_batches_tracked = count
            if steps and counts:
                added = [steps * self._norm_calls[norm] for norm in counts]
                torch._foreach_add_([count for count in counts.values() if count is not None], added)

    @torch.no_grad()
    def _look(self, steps: int) -> None:
        """Find out how many of ``steps`` steps a call makes, which batch norms count, and which weights are cast."""
        images, (context,) = self._inputs(1)
        taught = self.step.teach(images)
        self._length = steps_together(images, taught, min(self._most, steps))

        def forward() -> None:
            self.step.forward(images, taught, context, task=self._plain)

        self._norm_calls = _batch_norm_calls(self._plain, forward)
        # A compiled task has its own kernels.
        if self.step.task is self._plain:
            self._cast = _cast_layers(self._plain, forward, self._device)
            found = (module for module in self._plain.modules() if isinstance(module, ParallelBranches))
            self._joint = [layer for layer in found if joinable(layer)]

    def _body(self, count: int) -> None:
        assert self._tables is not None
        rates = torch.index_select(self._tables.rates, 0, self._at[:count], out=self._rates[:count])
        images, contexts = self._inputs(count)
        taught = self.step.teach(images)
        for index, context in enumerate(contexts):
            for group in self.step.optimizer.param_groups:
                group["lr"] = rates[index]
            own = slice(index * self._batch_size, (index + 1) * self._batch_size)
            with _cast_together(self._cast, self.step.autocast_to), branches_together(self._joint):
                self.step.train(images[own], _part(taught, own), context)
        self.step.count()
        self._at += count

    def _inputs(self, count: int) -> tuple[Tensor, list[StepContext]]:
        """The images of the next steps together, and the context of each."""
        assert self._tables is not None
        rows = _Tables(*(values.index_select(0, self._at[:count]) for values in self._tables))
        batch = self._batches.batch(rows.order.flatten(), rows.offsets.flatten(0, 1), rows.flips.flatten())
        by_step = zip(
            rows.positions, rows.orders, batch.labels.view(count, -1), batch.samples.view(count, -1), strict=True
        )
        contexts = [
            StepContext(epoch=epoch, orders=orders, labels=labels, samples=samples)
            for epoch, orders, labels, samples in by_step
        ]
        return batch.images, contexts

    def _first_losses(self, before: "_Snapshot", seed: int, run: Callable[[], None]) -> list[float]:
        """The losses of the first step of those that ``run`` runs."""
        before.restore(self.step.optimizer)
        self._at.copy_(self._first_rows)
        self.step.clear()
        torch.manual_seed(seed)
        run()
        return [float(value) for value in self.step.sums.latest[0].tolist()]

    def _warm_up(self, count: int) -> None:
        # The autograd engine would tie the default stream to the capture.
        with _side_stream(self._device):
            self._body(count)
            first = self.step.sums.latest.clone()
            for _ in range(max(1, _WARM_UPS - count)):
                # An epoch may have these steps only.
                self._at.copy_(self._first_rows)
                self._body(count)
            self.step.sums.latest.copy_(first)


def steps_together(images: Tensor, taught: Tapped | None, most: int) -> int:
    """How many steps a graph has, from 1 to ``most``, given the images of one step and what the teacher says of them.

    The images of all its steps and the teacher's outputs take at most ``_AHEAD_BYTES``, unless it has one step only.
    """
    tensors = [images]
    if taught is not None:
        tensors += [*taught.features.values(), *taught.preactivations.values(), taught.pooled, taught.logits]
    # A feature may be the same tensor under two names.
    size = sum({value.data_ptr(): value.nbytes for value in tensors}.values())
    return min(most, max(_AHEAD_BYTES // size, 1))


def _part(taught: Tapped | None, own: slice) -> Tapped | None:
    """What the teacher says of the images ``own``, without a copy."""
    if taught is None:
        return None
    return Tapped(
        features={name: value[own] for name, value in taught.features.items()},
        preactivations={name: value[own] for name, value in taught.preactivations.items()},
        pooled=taught.pooled[own],
        logits=taught.logits[own],
    )


class _CastTogether(torch.autograd.Function):
    """Weights in a lower precision, and their gradients back: a few kernels in place of two for each weight."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*weights)
        lower = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(lower, list(weights))
        return tuple(lower)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        whole = [
            None if gradient is None else torch.empty_like(weight)
            for weight, gradient in zip(ctx.saved_tensors, gradients, strict=True)
        ]
        given = [gradient for gradient in gradients if gradient is not None]
        torch._foreach_copy_([value for value in whole if value is not None], given)
        return None, *whole


@contextmanager
def _cast_together(layers: Sequence[nn.Module], dtype: torch.dtype | None) -> Iterator[None]:
    """Within the block ``layers`` have their trained weights in ``dtype``.

    Autocast would cast one after the other, to the same values.
    """
    slots = [
        (module, name, weight)
        for module in layers
        for name, weight in module.named_parameters(recurse=False)
        if weight.requires_grad and weight.dtype == torch.float32
    ]
    if dtype is None or not slots:
        yield
        return
    lower = _CastTogether.apply(dtype, *(weight for _, _, weight in slots))
    for (module, name, _), value in zip(slots, lower, strict=True):
        # Found before the parameter, which stays where it is.
        module.__dict__[name] = value
    try:
        yield
    finally:
        for module, name, _ in slots:
            del module.__dict__[name]


class _Tables(NamedTuple):
    """What the steps of an epoch read, one row a step; ``order`` and ``flips`` are (n,B), ``offsets`` (n,B,2)."""

    order: Tensor
    offsets: Tensor
    flips: Tensor
    orders: Tensor
    positions: Tensor
    rates: Tensor

    @classmethod
    def of(cls, plan: EpochPlan, draws: EpochDraws, batch_size: int) -> "_Tables":
        steps = len(plan.rates)
        order, offsets, flips = (
            values[: steps * batch_size].view(steps, batch_size, *values.shape[1:]) for values in draws
        )
        return cls(order, offsets, flips, plan.orders, plan.positions, plan.rates)

    def to(self, device: torch.device) -> "_Tables":
        return _Tables(*(values.clone().to(device) for values in self))

    def copy_(self, other: "_Tables") -> None:
        for own, new in zip(self, other, strict=True):
            own.copy_(new)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The values of all tensors of a task and of the state of its optimiser."""

    tensors: list[tuple[Tensor, Tensor]]
    #: Tensors that the optimiser had; those that it makes later start as zeros.
    known: dict[int, Tensor]

    @classmethod
    def of(cls, task: nn.Module, optimizer: torch.optim.Optimizer) -> "_Snapshot":
        tensors = [(value, value.detach().clone()) for value in (*task.parameters(), *task.buffers())]
        return cls(tensors, {id(value): value.clone() for value in _state_tensors(optimizer)})

    @torch.no_grad()
    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        for value, before in self.tensors:
            value.copy_(before)
        for value in _state_tensors(optimizer):
            # Zero moments and zero steps are what SGD and AdamW begin with.
            value.copy_(self.known[id(value)]) if id(value) in self.known else value.zero_()
        optimizer.zero_grad(set_to_none=True)


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _cast_layers(task: nn.Module, forward: Callable[[], None], device: torch.device) -> list[nn.Module]:
    """The convolutions and linear layers of ``task`` that every call in ``forward`` finds under autocast."""
    found: dict[nn.Module, bool] = {}

    def note(layer: nn.Module, _inputs: object) -> None:
        found[layer] = found.get(layer, True) and torch.is_autocast_enabled(device.type)

    layers = [module for module in task.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    forward()
    for handle in handles:
        handle.remove()
    return [layer for layer, casts in found.items() if casts]


def _batch_norm_calls(task: nn.Module, forward: Callable[[], None]) -> dict[_BatchNorm, int]:
    """How often ``forward`` calls each batch norm of ``task`` that counts its batches without reading the count."""
    calls: dict[_BatchNorm, int] = {}

    def note(norm: nn.Module, _inputs: object) -> None:
        assert isinstance(norm, _BatchNorm)
        calls[norm] = calls.get(norm, 0) + 1

    norms = [
        module
        for module in task.modules()
        if isinstance(module, _BatchNorm) and module.momentum is not None and module.num_batches_tracked is not None
    ]
    handles = [norm.register_forward_pre_hook(note) for norm in norms if norm.training]
    forward()
    for handle in handles:
        handle.remove()
    return calls


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _captured(body: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """Starts all kernels of ``body`` by one call, in the memory ``pool`` of another graph or in its own."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            body()
    except RuntimeError as error:
        if "deterministic implementation" in str(error):
            raise
        raise BackendUnavailableError(
            f"The training step cannot be captured as a CUDA graph: {str(error).splitlines()[0]}",
            remedy=_OFF,
        ) from error
    return graph


def _require_same(names: Sequence[str], expected: Sequence[float], found: Sequence[float]) -> None:
    """Raise ``BackendUnavailableError`` unless the first step has the same losses in both forms."""
    for name, one, other in zip(names, expected, found, strict=True):
        # A loss that is not finite in both is for the watch of the run.
        both_bad = not math.isfinite(one) and not math.isfinite(other)
        if not both_bad and not abs(other - one) <= _SAME_LOSS * max(abs(one), 1e-3):
            raise BackendUnavailableError(
                f"The training step gives another loss/{name} as a CUDA graph: {other:.6g} in the first step instead "
                f"of {one:.6g} (at most {_SAME_LOSS:.0%} are allowed).",
                remedy=_OFF,
            )
