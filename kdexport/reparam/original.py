"""Runs a network as its author calls it, and compares what torch.export made of it with these runs.

torch.export records one path through forward(), for one example. A network that takes another path for another batch
size, or that draws numbers, is exported without an error as a program that computes something else.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.utils import _pytree as pytree

from kdexport.errors import ReparamError, first_line
from kdexport.reparam.certificate import hostile_input, relative_error
from kdexport.reparam.evaluation import Evaluation

#: Batch sizes of the comparison: torch.export and many networks treat 1 in a special way, 3 is odd.
BATCHES = (2, 1, 3)

#: How often its own rounding error a network may differ from its program: other kernels round in another order.
_ROUNDINGS = 32.0


@dataclass(frozen=True, slots=True)
class Run:
    """What the original computes from ``inputs`` of ``batch`` images, in its own type."""

    batch: int
    inputs: tuple[Tensor, ...]
    outputs: Any


def independent_copy(module: nn.Module) -> nn.Module:
    """A deep copy, also of a module whose weight is computed by a hook and therefore carries a gradient history."""
    computed: dict[int, Any] = {}
    for child in module.modules():
        for value in vars(child).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                computed[id(value)] = value.detach().clone()
    return copy.deepcopy(module, computed)


def store_computed_weights(module: nn.Module) -> None:
    """Replace weight norm, spectral norm and pruning masks that hooks apply by the weights that they compute.

    Parametrizations stay: torch removes them from the class, which a copy shares with its original. They are exported
    as operators on weights alone, which the merge computes once.
    """
    for child in list(module.modules()):
        for hook in list(child._forward_pre_hooks.values()):
            with torch.no_grad():
                if isinstance(hook, WeightNorm):
                    remove_weight_norm(child, hook.name)
                elif isinstance(hook, SpectralNorm):
                    remove_spectral_norm(child, hook.name)
                elif isinstance(hook, prune.BasePruningMethod):
                    prune.remove(child, hook._tensor_name)  # type: ignore[no-untyped-call]


def run_module(module: nn.Module, examples: Sequence[Tensor]) -> list[Run]:
    """The runs of an eval-mode module on noise of the shapes of ``examples``, batch first, at each of ``BATCHES``.

    Integer inputs repeat the rows of the example. Raises ``ReparamError`` for a module that fails at one of them, and
    for one that draws random numbers outside of torch's operators, where the exported program would not show it.
    """
    name = type(module).__name__
    runs = []
    for batch in BATCHES:
        inputs = tuple(_of_batch(example, batch) for example in examples)
        before = _generator_states()
        try:
            with torch.no_grad():
                outputs = module(*inputs)
        # The module's own forward runs here, and may raise anything.
        except Exception as error:
            sizes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise ReparamError(
                f"{name} cannot be run on inputs {sizes}, a batch of {batch}: {type(error).__name__}: "
                f"{first_line(error)}",
                remedy="Check the input shape; the merged program takes every batch size, so forward() must do so too. "
                "A program with a fixed batch can be passed as a .pt2 file.",
            ) from error
        for generator, (old, new) in zip(("random", "numpy.random"), zip(before, _generator_states(), strict=True),
                                         strict=True):  # fmt: skip
            if old != new:
                raise ReparamError(
                    f"The forward pass of {name} draws numbers from Python's {generator}: two runs differ.",
                    remedy="Remove the random choice from the evaluation path, for example with `if self.training`.",
                )
        runs.append(Run(batch, inputs, outputs))
    return runs


def _generator_states() -> tuple[int, int]:
    legacy = np.random.get_state()
    return hash(random.getstate()), hash((legacy[1].tobytes(), legacy[2]))  # type: ignore[index]


def run_program(program: Callable[..., Any], inputs: Sequence[Tensor], batches: Sequence[int]) -> list[Run]:
    """The runs of an exported program on noise of the shapes of ``inputs``, at each of ``batches`` that it accepts."""
    runs = []
    for batch in batches:
        given = tuple(_of_batch(item, batch) for item in inputs)
        try:
            with torch.no_grad():
                runs.append(Run(batch, given, program(*given)))
        # The guards of the program refuse sizes that it was not exported for.
        except Exception as error:
            if batch == batches[0]:
                sizes = ", ".join(str(tuple(x.shape)) for x in given)
                raise ReparamError(
                    f"The program does not run on inputs {sizes}: {first_line(error)}",
                    remedy="Export it again, and run the exported program once before torch.export.save.",
                ) from error
    return runs


def _of_batch(example: Tensor, batch: int) -> Tensor:
    if example.dim() == 0:
        return example
    if example.is_floating_point():
        return hostile_input((batch, *example.shape[1:])).to(example)
    rows = torch.arange(batch, device=example.device) % example.shape[0]
    return example[rows]


def require_same_function(module: fx.GraphModule, runs: Sequence[Run], name: str) -> None:
    """``module``, the graph before any merge, computes what the original computed in ``runs``.

    Both run in the same type, so they agree up to the order of roundings: the difference may be up to 32 times the
    distance of the graph from itself in float64. Raises ``ReparamError`` that names the batch otherwise.
    """
    for run in runs:
        with torch.no_grad():
            found = module(*run.inputs)
        wanted, structure = pytree.tree_flatten(run.outputs)
        candidates, other = pytree.tree_flatten(found)
        if structure != other or not all(map(_comparable, candidates, wanted)):
            raise _other_function(name, run, "the number, shape or type of its outputs")
        exact: list[Tensor] | None = None
        tensors = [pair for pair in zip(candidates, wanted, strict=True) if isinstance(pair[0], Tensor)]
        for index, (candidate, reference) in enumerate(tensors):
            if _identical(candidate, reference):
                continue
            if exact is None:
                exact = Evaluation(module).evaluate([_wide(x) for x in run.inputs])
            candidate, reference = candidate.cpu(), reference.cpu()
            own_error = relative_error(candidate, exact[index], infinities=True)
            limit = _ROUNDINGS * max(own_error, _step(candidate))
            error = relative_error(candidate, reference, infinities=True)
            # NaN compares as false.
            if not error <= limit:
                what = f"output {index} by {error:.1e} of its largest value"
                raise _other_function(name, run, f"{what} (up to {limit:.0e} is rounding)")


def _identical(candidate: Tensor, reference: Tensor) -> bool:
    # A narrow type can overflow to NaN on noise; in float64 the outputs must be numbers.
    both_nan = (candidate != candidate) & (reference != reference)
    return bool(((candidate == reference) | both_nan).all())


def _comparable(candidate: Any, reference: Any) -> bool:
    if isinstance(candidate, Tensor) and isinstance(reference, Tensor):
        return candidate.shape == reference.shape and candidate.dtype == reference.dtype
    return type(candidate) is type(reference) and bool(candidate == reference)


def _other_function(name: str, run: Run, what: str) -> ReparamError:
    return ReparamError(
        f"{name} and the program that torch.export makes of it differ at batch {run.batch} in {what}.",
        remedy="forward() must not choose its path by the batch size, by values, or by anything outside of its inputs "
        "and weights: torch.export records one path.",
    )


def _wide(value: Tensor) -> Tensor:
    return value.to("cpu", torch.float64) if value.is_floating_point() else value.cpu()


def _step(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
