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

from kdexport.errors import ReparamError
from kdexport.reparam.certificate import Certificate, hostile_input, relative_error
from kdexport.reparam.dataflow import LeftAlone, find_merges
from kdexport.reparam.evaluation import Evaluation
from kdexport.reparam.exported import export_module, functional_graph, reexport
from kdexport.reparam.operators import CONVS, LINEARS, arguments
from kdexport.reparam.rewrite import rewrite, round_merged, settle


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What a graph costs: operators by name, parameters, multiply-accumulates of its layers with weights, per image."""

    operators: dict[str, int]
    parameters: int
    multiply_accumulates: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FusedProgram:
    """The merged module, in the type of the original, and the proof that it computes the same.

    ``program`` is it as an exported program with the dynamic dimensions of the original; ``left_alone`` says what was
    not merged and why; ``before`` and ``after`` are what both cost; ``weights`` names
    the merged ones in ``program.state_dict``.
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
    if isinstance(source, ExportedProgram):
        program = source
    elif example_inputs is None:
        raise ReparamError("A module came without example inputs.", remedy="Pass one tensor per input of forward().")
    else:
        program = export_module(source, example_inputs)
    module = functional_graph(program)
    evaluation = Evaluation(module)
    inputs = _hostile_inputs(module, program if example_inputs is None else None, example_inputs)
    reference = evaluation.evaluate(inputs)
    before = _size(evaluation)
    plan = find_merges(evaluation)
    blocks, hazards = rewrite(evaluation, plan)
    roundings = settle(module)
    errors = [relative_error(*pair) for pair in zip(evaluation.evaluate(inputs), reference, strict=True)]
    after = _size(evaluation)
    certificate = Certificate(
        blocks=tuple(blocks),
        whole_relative_error=max(errors, key=lambda error: math.inf if math.isnan(error) else error, default=math.nan),
        input_shape=tuple(inputs[0].shape),
        unfused_parameters=before.parameters,
        fused_parameters=after.parameters,
        hazards=tuple(hazards),
    )
    certificate.require()
    round_merged(module, roundings)
    written = reexport(module, program)
    return FusedProgram(
        module=written.module(),
        program=written,
        certificate=certificate,
        left_alone=plan.left_alone,
        before=before,
        after=after,
        weights=tuple(item.name for item in roundings),
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
            inputs.append(given[index] if index < len(given) else torch.zeros(sizes, dtype=value.dtype))
    return inputs


def _size(evaluation: Evaluation) -> Size:
    operators: Counter[str] = Counter()
    macs = 0
    for node in evaluation.graph.nodes:
        if node.op != "call_function" or node in evaluation.constants or node not in evaluation.shapes:
            continue
        named = node.args[0] if node.target is operator.getitem else node
        operators[str(named.target).split(".")[1]] += 1
        if node.target in CONVS | LINEARS:
            macs += _macs(node, evaluation)
    parameters = sum(value.numel() for value in evaluation.module.parameters())
    return Size(operators=dict(sorted(operators.items())), parameters=parameters, multiply_accumulates=macs)


def _macs(node: fx.Node, evaluation: Evaluation) -> int:
    given = arguments(node)
    weight = given["weight"] if "weight" in given else given["mat2"]
    shape = evaluation.shapes[node]
    positions = math.prod(shape[2:]) if node.target in CONVS else math.prod(shape[1:-1])
    return int(math.prod(evaluation.shapes[weight]) * positions)
