"""Merges the parallel branches, sequences and batch norms of any module or exported program, with a certificate."""

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from kdexport.errors import CertificateError, ReparamError
from kdexport.reparam.certificate import Certificate, hostile_input, relative_error
from kdexport.reparam.dataflow import LeftAlone, find_merges
from kdexport.reparam.evaluation import Evaluation
from kdexport.reparam.exported import export_module, functional_graph, reexport
from kdexport.reparam.operators import LAYERS, LINEARS, NORMS, TRANSPOSED, arguments
from kdexport.reparam.original import (
    BATCHES,
    Run,
    independent_copy,
    require_same_function,
    run_module,
    run_program,
    store_computed_weights,
)
from kdexport.reparam.rewrite import Rounding, prune_unused, rewrite, round_merged
from kdexport.reparam.structure import refuse_hooks, require_eval


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What a graph costs: operators by name, parameters, multiply-accumulates of its layers with weights, per image."""

    operators: dict[str, int]
    parameters: int
    multiply_accumulates: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FusedProgram:
    """The merged module, in the type of the original, and the proof that it computes the same.

    ``program`` is the exported program with the dynamic dimensions of the original; ``left_alone`` lists what was not
    merged and why; ``before`` and ``after`` are the costs; ``weights`` are the names of the merged weights in
    ``program.state_dict``.
    """

    module: fx.GraphModule
    program: ExportedProgram
    certificate: Certificate
    left_alone: tuple[LeftAlone, ...]
    before: Size
    after: Size
    weights: tuple[str, ...]


def fuse_module(source: nn.Module | ExportedProgram, example_inputs: Sequence[Tensor] | None = None) -> FusedProgram:
    """Merge what can be merged exactly in an eval-mode module or an exported program; neither is changed.

    ``example_inputs`` are needed for a module: one tensor per input, batch first; the batch becomes dynamic. The
    certificate is computed in float64 on hostile input of these shapes. Raises ``ReparamError`` for training mode,
    hooks, or a program that cannot be read, and ``CertificateError`` should the result differ.
    """
    program, module, runs = _read(source, example_inputs)
    require_same_function(module, runs, "The program" if source is program else type(source).__name__)
    inputs = _hostile_inputs(module, program if example_inputs is None else None, example_inputs)
    merged = merge_graph(module, inputs)
    round_merged(module, list(merged.roundings))
    written = reexport(module, program, [tuple(x.shape) for x in inputs])
    return FusedProgram(
        module=written.module(),
        program=written,
        certificate=merged.certificate,
        left_alone=merged.left_alone,
        before=merged.before,
        after=merged.after,
        weights=tuple(item.name for item in merged.roundings),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedGraph:
    """What ``merge_graph`` did to a graph: the fields of ``FusedProgram``, and the merged weights as ``roundings``."""

    certificate: Certificate
    left_alone: tuple[LeftAlone, ...]
    before: Size
    after: Size
    roundings: tuple[Rounding, ...]


def merge_graph(module: fx.GraphModule, inputs: Sequence[Tensor]) -> MergedGraph:
    """Merge what can be merged exactly in a functional graph, in place; ``inputs`` are float64 noise, batch first.

    The merged weights are float64 until ``round_merged``. Raises ``CertificateError`` should the result differ, or cost
    more than the original.
    """
    evaluation = Evaluation(module)
    reference = evaluation.evaluate(inputs)
    _require_numbers(reference)
    batch = inputs[0].shape[0] if inputs and inputs[0].dim() else 1
    before = _size(evaluation, batch)
    plan = find_merges(evaluation)
    left_alone = plan.left_alone
    blocks, hazards = rewrite(evaluation, plan)
    # It holds all merged weights in float64.
    del plan
    roundings = prune_unused(module)
    errors = [
        relative_error(found, wanted, infinities=True)
        for found, wanted in zip(evaluation.evaluate(inputs), reference, strict=True)
    ]
    after = _size(evaluation, batch)
    certificate = Certificate(
        blocks=tuple(blocks),
        whole_relative_error=max(errors, key=lambda error: math.inf if math.isnan(error) else error, default=math.nan),
        input_shape=tuple(inputs[0].shape),
        unfused_parameters=before.parameters,
        fused_parameters=after.parameters,
        hazards=tuple(hazards),
    )
    certificate.require()
    _require_no_extra_cost(before, after)
    return MergedGraph(
        certificate=certificate,
        left_alone=left_alone,
        before=before,
        after=after,
        roundings=tuple(roundings),
    )


def original_graph(source: nn.Module, example: Tensor) -> fx.GraphModule:
    """The functional graph of an eval-mode module of one input, before any merge.

    It is compared with runs of the module at batches 1, 2 and 3. Raises ``ReparamError`` for a module that cannot be
    exported as the function that it computes.
    """
    _, module, runs = _read(source, (example,))
    require_same_function(module, runs, type(source).__name__)
    return module


def _read(
    source: nn.Module | ExportedProgram, example_inputs: Sequence[Tensor] | None
) -> tuple[ExportedProgram, fx.GraphModule, list[Run]]:
    """The program, its functional graph, and runs of the original that the graph must repeat."""
    if isinstance(source, ExportedProgram):
        module = functional_graph(source)
        inputs = _hostile_inputs(module, source, None)
        return source, module, run_program(source.module(), *_batched(module, inputs))
    if isinstance(source, torch.jit.ScriptModule):
        raise ReparamError(
            "A TorchScript module cannot be exported.",
            remedy="Pass the Python module that it was scripted or traced from.",
        )
    if example_inputs is None:
        raise ReparamError(
            "A module was given without example inputs.", remedy="Pass one tensor per input of forward()."
        )
    require_eval(source)
    refuse_hooks(source, stored=True)
    own = independent_copy(source)
    runs = run_module(own, example_inputs)
    store_computed_weights(own)
    program = export_module(own, example_inputs)
    return program, functional_graph(program), runs


def _batched(module: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
    """``inputs`` in the types of the program, and the batch sizes that it can be run at."""
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    examples = [item.to(value.device, value.dtype) for item, value in zip(inputs, values, strict=True)]
    own = next((item.shape[0] for item in examples if item.dim() > 0), 1)
    dynamic = all(value.dim() > 0 and not isinstance(value.shape[0], int) for value in values)
    return examples, tuple(dict.fromkeys((own, *BATCHES))) if dynamic else (own,)


def _require_numbers(outputs: Sequence[Tensor]) -> None:
    if any(value.isnan().any() for value in outputs):
        raise ReparamError(
            "The output holds NaN on noise before anything is merged, so that nothing can be compared.",
            remedy="Check the weights; the square root or logarithm of a negative number is NaN, too.",
        )


def _require_no_extra_cost(before: Size, after: Size) -> None:
    costs = before.multiply_accumulates, after.multiply_accumulates
    if costs[1] > costs[0]:
        raise CertificateError(
            f"The merged program would need {costs[1]:,} multiply-accumulates (up to {costs[0]:,} allowed: those "
            "of the original).",
            remedy="No merge may cost more: open an issue in kdexport's repository with the module that shows it.",
        )


def _hostile_inputs(
    module: fx.GraphModule, program: ExportedProgram | None, example_inputs: Sequence[Tensor] | None
) -> list[Tensor]:
    """Noise of the example's shapes, with a batch of at least two where it is dynamic; indices as they are."""
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    given: Sequence[Any] = example_inputs or ()
    if program is not None and program.example_inputs is not None:
        given = program.example_inputs[0]
    inputs = []
    for index, node in enumerate(places):
        value = node.meta["val"]
        sizes = list(given[index].shape) if index < len(given) else [int(size) for size in value.shape]
        if sizes and sizes[0] == 1 and not isinstance(value.shape[0], int):
            sizes[0] = 2
        if value.is_floating_point():
            inputs.append(hostile_input(tuple(sizes)))
        else:
            example = given[index] if index < len(given) else torch.zeros(sizes, dtype=value.dtype)
            inputs.append(torch.cat([example, example]) if sizes[:1] != list(example.shape[:1]) else example)
    return inputs


def _size(evaluation: Evaluation, batch: int) -> Size:
    operators: Counter[str] = Counter()
    macs = 0
    for node in evaluation.graph.nodes:
        if node.op != "call_function" or node in evaluation.constants or node not in evaluation.shapes:
            continue
        named = node.args[0] if node.target is operator.getitem else node
        operators[str(named.target).split(".")[1]] += 1
        if node.target in LAYERS - NORMS:
            macs += _macs(node, evaluation) // batch
    parameters = sum(value.numel() for value in evaluation.module.parameters())
    return Size(
        operators=dict(sorted(operators.items())),
        parameters=parameters,
        multiply_accumulates=macs,
    )


def _macs(node: fx.Node, evaluation: Evaluation) -> int:
    """Multiply-accumulates of a layer for the whole batch."""
    given = arguments(node)
    weight = given["weight"] if "weight" in given else given["mat2"]
    # A transposed convolution multiplies each position of its input, a plain one each of its output.
    transposed = given.get("transposed", node.target in TRANSPOSED)
    shape = evaluation.shapes[given["input"] if transposed else node]
    positions = math.prod(shape[:-1]) if node.target in LINEARS else shape[0] * math.prod(shape[2:])
    return int(math.prod(evaluation.shapes[weight]) * positions)
