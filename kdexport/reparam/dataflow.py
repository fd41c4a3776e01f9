"""Finds in a functional graph what can be merged: layers in sequence, parallel branches, batch norms.

Each value is a sum of paths. A path starts at a source and applies linear layers in sequence. A value that several
operators read is a source, because it has to be computed in any case. Layers of a path are joined if that is exact and
costs no more.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kdexport.errors import ReparamError
from kdexport.reparam.compose import add, aligned_geometry, compose, composed_weights, concatenate
from kdexport.reparam.convolution import Convolution, identity
from kdexport.reparam.evaluation import Evaluation
from kdexport.reparam.operators import (
    LAYERS,
    NORMS,
    Concat,
    GraphContext,
    Layer,
    Operator,
    Sum,
    WeightKey,
    arguments,
    read,
)

#: Layers that multiply by weights; all others cost nothing as they are, and their kernel once they are a convolution.
_WEIGHTED = {"convolution", "transposed convolution", "linear layer", "batch norm"}

Shapes = dict[fx.Node, tuple[int, ...]]

#: Why something that looks mergeable is not, by the node that it is about.
Reasons = dict[fx.Node, str]


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A convolution that may be written: it maps the value of ``entry`` to the sum of the values of ``results``.

    ``nodes`` compute that so far, ``kinds`` counts them; with ``border`` the stage pads by those values per channel and
    is no convolution by itself. ``branches`` is the number of parallel paths that were merged into it.
    """

    conv: Convolution
    entry: fx.Node
    nodes: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    kinds: Counter[str]
    border: Tensor | None = None
    branches: int = 1

    @property
    def weights(self) -> int:
        """Weights that the layers of this stage multiply by."""
        return self.conv.weight.numel() if any(kind in _WEIGHTED for kind in self.kinds) else 0

    def macs(self, shapes: Shapes) -> int:
        """Multiply-accumulates per image."""
        return self.weights * math.prod(shapes[self.results[0]][2:])


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """``stages`` after each other, from the value of ``source``; without a stage it is that value."""

    source: fx.Node
    stages: tuple[Stage, ...] = ()


def stage_of(layer: Layer) -> Stage:
    """A layer by itself."""
    return Stage(layer.conv, layer.source, layer.nodes, layer.nodes[-1:], Counter([layer.kind]), layer.border)


def describe(stage: Stage) -> str:
    """What was merged, in words."""
    counted = [(kind, count) for kind, count in stage.kinds.items() if kind != "identity"]
    parts = " + ".join(kind if count == 1 else f"{count} {kind}s" for kind, count in counted)
    return f"{stage.branches} branches: {parts}" if stage.branches > 1 else parts


def extend(path: Path, layer: Layer, shapes: Shapes, reasons: Reasons) -> Path:
    """``path`` with ``layer`` behind, joined with the stages before it where that is exact and costs no more.

    Why an affordable join is not exact is noted in ``reasons``, by the later layer's node.
    """
    stages = (*path.stages, stage_of(layer))
    while len(stages) > 1:
        taken, joined = 2, _join(stages[-2:], shapes, reasons)
        # A padding alone can join neither neighbour and still join both.
        if joined is None and len(stages) > 2 and set(stages[-2].kinds) == {"padding"}:
            taken, joined = 3, _join(stages[-3:], shapes, reasons)
        if joined is None:
            break
        for stage in stages[-taken:]:
            reasons.pop(stage.results[0], None)
        stages = (*stages[:-taken], joined)
    return Path(path.source, stages)


def _join(stages: Sequence[Stage], shapes: Shapes, reasons: Reasons) -> Stage | None:
    weights, macs = sum(s.weights for s in stages), sum(s.macs(shapes) for s in stages)
    positions = math.prod(shapes[stages[-1].results[0]][2:])
    try:
        conv = collapse(stages, min(weights, macs // positions))
    except ReparamError as error:
        reasons[stages[-1].results[0]] = error.message
        return None
    if conv is None:
        return None
    kinds = sum((s.kinds for s in stages), Counter[str]())
    nodes = tuple(node for stage in stages for node in stage.nodes)
    branches = max(stage.branches for stage in stages)
    return Stage(conv, stages[0].entry, nodes, stages[-1].results, kinds, branches=branches)


def collapse(stages: Sequence[Stage], budget: int) -> Convolution | None:
    """All stages as one convolution, or None where it would hold more than ``budget`` weights.

    Raises ``ReparamError`` where there is no exact one.
    """
    if stages[0].border is not None:
        raise ReparamError(
            "A padding with a constant other than zero does not follow a layer whose shift it could be.",
            remedy="Pad with zeros, or pad the output of a layer with its shift.",
        )
    conv = stages[0].conv
    for stage in stages[1:]:
        if composed_weights(conv, stage.conv) > budget:
            return None
        conv = compose(conv, stage.conv, stage.border)
    return conv


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """A path that is summed with coefficient ``factor``; ``leaves`` are the summands of the graph it stands for."""

    path: Path
    factor: float
    leaves: tuple[fx.Node, ...]


def merge_terms(terms: Sequence[Term], node: fx.Node, shapes: Shapes, reasons: Reasons) -> list[Term] | None:
    """Terms of the sum ``node``; those of one source are merged where it is exact and costs no more, others stay.

    Terms with coefficients merge all together or, None, not at all: a part of them would need its own multiplication.
    """
    budget = sum(s.weights for term in terms for s in term.path.stages)
    whole, kept = [], []
    for term in terms:
        conv = _as_one(term, budget, shapes, reasons)
        if conv is None:
            kept.append(term)
        else:
            whole.append((term, conv))
    alone = not kept and len({term.path.source for term, _ in whole}) == 1
    if alone:
        merged = _merge(whole, node, shapes, reasons, all_of_them=True)
        if merged is not None:
            return [merged[0]]
    if any(term.factor != 1 for term in terms):
        return None
    while True:
        pair = _best_pair(whole, node, shapes)
        merged = None if pair is None else _merge(pair, node, shapes, reasons)
        if pair is None or merged is None:
            return [*(term for term, _ in whole), *kept]
        whole = [item for item in whole if item[0] not in (pair[0][0], pair[1][0])] + [merged]


def _as_one(term: Term, budget: int, shapes: Shapes, reasons: Reasons) -> Convolution | None:
    shape = shapes[term.path.source]
    if not term.path.stages:
        return identity(shape[1], len(shape) - 2)
    try:
        return collapse(term.path.stages, budget)
    except ReparamError as error:
        reasons[term.leaves[0]] = error.message
        return None


Whole = tuple[Term, Convolution]


def _best_pair(whole: Sequence[Whole], node: fx.Node, shapes: Shapes) -> tuple[Whole, Whole] | None:
    best, saved = None, -1
    for index, one in enumerate(whole):
        for two in whole[:index]:
            if one[0].path.source is two[0].path.source:
                gain = _saving((two, one), node, shapes)
                if gain is not None and gain > saved:
                    best, saved = (two, one), gain
    return best


def _saving(whole: Sequence[Whole], node: fx.Node, shapes: Shapes) -> int | None:
    """Multiply-accumulates that merging saves, None where it is not exact or costs more of them, or more weights."""
    convs = [conv for _, conv in whole]
    try:
        kernel = aligned_geometry(convs)[0]
    except ReparamError:
        return None
    groups = math.gcd(*(conv.groups for conv in convs))
    weights = convs[0].out_channels * convs[0].in_channels // groups * math.prod(kernel)
    stages = [stage for term, _ in whole for stage in term.path.stages]
    if weights > sum(stage.weights for stage in stages):
        return None
    saving = sum(stage.macs(shapes) for stage in stages) - weights * math.prod(shapes[node][2:])
    return saving if saving >= 0 else None


def _merge(
    whole: Sequence[Whole], node: fx.Node, shapes: Shapes, reasons: Reasons, *, all_of_them: bool = False
) -> Whole | None:
    try:
        aligned_geometry([conv for _, conv in whole])
    except ReparamError as error:
        reasons[node] = error.message
        return None
    if _saving(whole, node, shapes) is None:
        reasons[node] = "One convolution in place of these branches would cost more multiply-accumulates."
        return None
    conv = add(*(conv for _, conv in whole), coefficients=[term.factor for term, _ in whole])
    leaves = tuple(leaf for term, _ in whole for leaf in term.leaves)
    results = (node,) if all_of_them else leaves
    source = whole[0][0].path.source
    kinds = sum((s.kinds for term, _ in whole for s in term.path.stages), Counter[str]())
    branches = sum(max((s.branches for s in term.path.stages), default=1) for term, _ in whole)
    nodes = tuple(n for term, _ in whole for s in term.path.stages for n in s.nodes)
    stage = Stage(conv, source, nodes, results, kinds, branches=branches)
    return Term(Path(source, (stage,)), 1.0, results), conv


def side_by_side(paths: Sequence[Path], node: fx.Node, shapes: Shapes) -> Path | None:
    """Paths of one source that are concatenated along the channels, as one if that is exact and costs no more."""
    stages = [stage for path in paths for stage in path.stages]
    if len({path.source for path in paths}) > 1 or any(not path.stages for path in paths):
        return None
    budget = sum(stage.weights for stage in stages)
    try:
        convs = [collapse(path.stages, budget) for path in paths]
        whole = [conv for conv in convs if conv is not None]
        kernel = aligned_geometry(whole)[0]
    except ReparamError:
        return None
    channels = sum(conv.out_channels for conv in whole)
    weights = channels * whole[0].in_channels * math.prod(kernel) if len(whole) == len(convs) else budget + 1
    macs = sum(stage.macs(shapes) for stage in stages)
    if weights > budget or weights * math.prod(shapes[node][2:]) > macs:
        return None
    kinds = sum((stage.kinds for stage in stages), Counter[str]())
    nodes = tuple(item for stage in stages for item in stage.nodes)
    merged = Stage(concatenate(*whole), paths[0].source, nodes, (node,), kinds, branches=len(paths))
    return Path(paths[0].source, (merged,))


@dataclass(frozen=True, slots=True, eq=False)
class Rewrite:
    """The value of ``node`` is the sum of ``paths``."""

    node: fx.Node
    paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """What was not merged, by node or parameter name, and why."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What to rewrite, in the order of the graph, and what is left as it is."""

    rewrites: tuple[Rewrite, ...]
    left_alone: tuple[LeftAlone, ...]


def find_merges(evaluation: Evaluation) -> Plan:
    """Everything that is merged in the graph that ``evaluation`` has run.

    Layers at several places may share weights. Their merges are written as one where they are equal; where they differ
    and would need more weights than the layers have, these weights are kept and the layers left alone.
    """
    kept: set[WeightKey] = set()
    while True:
        context = GraphContext(evaluation, kept)
        plan = _MergePlanner(evaluation, context).plan()
        costlier = _costlier_sharing(plan, context)
        if not costlier:
            return plan
        kept |= costlier


def _costlier_sharing(plan: Plan, context: GraphContext) -> set[WeightKey]:
    """Weights that several places share and whose merges would need more weights than they replace."""
    stages = [stage for item in plan.rewrites for path in item.paths for stage in path.stages if is_rewritten(stage)]
    keys = [set().union(*(context.keys(node) for node in stage.nodes)) for stage in stages]
    costlier: set[WeightKey] = set()
    for group in _connected(keys):
        shared = {key for index in group for key in keys[index] if context.uses[key] > 1}
        if not shared:
            continue
        inside: Counter[WeightKey] = Counter()
        for index in group:
            for node in stages[index].nodes:
                if node.target in LAYERS:
                    inside.update(context.keys(node))
        # A weight that a layer elsewhere reads has to remain.
        freed = sum(math.prod(key[1]) for key, count in inside.items() if count == context.uses[key])
        distinct = distinct_convolutions([stages[index].conv for index in group])
        if sum(conv.weight.numel() + conv.bias.numel() for conv in distinct) > freed:
            costlier |= shared
    return costlier


def _connected(keys: Sequence[set[WeightKey]]) -> list[list[int]]:
    """Indices of ``keys``, in groups that share one with each other."""
    groups: list[tuple[set[WeightKey], list[int]]] = []
    for index, own in enumerate(keys):
        touching = [group for group in groups if group[0] & own]
        merged = (own.union(*(group[0] for group in touching)), [i for group in touching for i in group[1]] + [index])
        groups = [group for group in groups if group not in touching] + [merged]
    return [indices for _, indices in groups]


def distinct_convolutions(convs: Sequence[Convolution]) -> list[Convolution]:
    """``convs`` without those whose weight and bias are equal to those of an earlier one."""
    found: list[Convolution] = []
    for conv in convs:
        if not any(same_weights(conv, other) for other in found):
            found.append(conv)
    return found


def same_weights(one: Convolution, other: Convolution) -> bool:
    """Whether both have the same weight and bias, bit by bit."""
    return torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


class _MergePlanner:
    def __init__(self, evaluation: Evaluation, context: GraphContext) -> None:
        self._graph = evaluation.graph
        self._context = context
        self._shapes: Shapes = evaluation.shapes
        self._terms: dict[fx.Node, list[Term]] = {}
        self._linear: set[fx.Node] = set()
        self._reasons: Reasons = {}

    def plan(self) -> Plan:
        for node in self._graph.nodes:
            try:
                operator = read(node, self._context)
            except ReparamError as error:
                self._reasons[node] = error.message
                continue
            if operator is not None:
                self._linear.add(node)
                terms = self._value(node, operator)
                if terms is not None:
                    self._terms[node] = terms
        rewrites = tuple(reversed(self._live_rewrites()))
        for item in rewrites:
            for path in item.paths:
                for stage in path.stages:
                    self._explain_lone_norm(stage)
        left = [LeftAlone(self._context.place(node), reason) for node, reason in self._reasons.items()]
        return Plan(rewrites, tuple(dict.fromkeys(left)))

    def _explain_lone_norm(self, stage: Stage) -> None:
        """Why a batch norm found no layer to fold into."""
        if not stage.kinds["batch norm"] or is_rewritten(stage):
            return
        norm = next(node for node in stage.nodes if node.target in NORMS)
        source = norm.all_input_nodes[0]
        name = (
            str(source.target).removeprefix("aten.").partition(".")[0] if source.op == "call_function" else "an input"
        )
        if source in self._linear and len(source.users) > 1:
            fact = f"The batch norm follows {name}, whose output is read by {len(source.users)} operators"
        else:
            fact = f"The batch norm follows {name}, which is not a convolution or linear layer with no other reader"
        self._reasons.setdefault(norm, f"{fact}, and no layer after it can absorb it.")

    def _value(self, node: fx.Node, operator: Operator) -> list[Term] | None:
        if isinstance(operator, Layer):
            private = len(operator.source.users) == 1
            path = extend(self._path(operator.source, private), operator, self._shapes, self._reasons)
            if private and operator.kind == "batch norm":
                # The path contains the layer, whose weights need not be held twice. A padding is different: a border
                # that is written later starts at the same source.
                self._terms.pop(operator.source, None)
            return [Term(path, 1.0, (node,))]
        if isinstance(operator, Concat):
            paths = [self._path(operand, self._is_private(operand, operator)) for operand in operator.operands]
            joined = side_by_side(paths, node, self._shapes)
            return None if joined is None else [Term(joined, 1.0, (node,))]
        terms = [term for index in range(len(operator.operands)) for term in self._summand(operator, index)]
        merged = merge_terms(terms, node, self._shapes, self._reasons)
        if merged is not None and len(merged) == 1:
            self._forget_reasons(terms)
        return merged

    def _summand(self, operator: Sum, index: int) -> list[Term]:
        operand, factor = operator.operands[index], operator.coefficients[index]
        if operand in self._terms and self._is_private(operand, operator):
            terms = self._terms[operand]
            if len(terms) == 1:
                return [Term(terms[0].path, factor, (operand,))]
            if factor == 1:
                return terms
        return [Term(Path(operand), factor, (operand,))]

    def _path(self, node: fx.Node, private: bool) -> Path:
        terms = self._terms.get(node, [])
        return terms[0].path if private and len(terms) == 1 else Path(node)

    @staticmethod
    def _is_private(operand: fx.Node, operator: Sum | Concat) -> bool:
        return len(operand.users) == 1 and operator.operands.count(operand) == 1

    def _forget_reasons(self, terms: list[Term]) -> None:
        """What could not be joined in sequence has been merged in parallel after all."""
        for term in terms:
            for stage in term.path.stages:
                self._reasons.pop(stage.results[0], None)

    def _live_rewrites(self) -> list[Rewrite]:
        output = next(node for node in self._graph.nodes if node.op == "output")
        live, found = set(output.all_input_nodes), []
        for node in reversed(self._graph.nodes):
            if node.is_impure() and node.op != "placeholder":
                live.update(node.all_input_nodes)
            if node not in live or node is output:
                continue
            paths = self._rewritten(node)
            if paths is None:
                live.update(node.all_input_nodes)
            else:
                live.update(path.source for path in paths)
                found.append(Rewrite(node, paths))
        return found

    def _rewritten(self, node: fx.Node) -> tuple[Path, ...] | None:
        terms = self._terms.get(node)
        if terms is None:
            return None
        if len(terms) > 1 and all(len(term.leaves) == 1 for term in terms):
            return None
        return tuple(term.path for term in terms)


def is_rewritten(stage: Stage) -> bool:
    """Whether the stage becomes a new convolution; otherwise its nodes stay.

    Batch norms, scales and poolings without a layer of weights stay what they are: a depthwise convolution in their
    place is slower in every runtime.
    """
    kinds = stage.kinds
    layers = kinds["convolution"] + kinds["transposed convolution"] + kinds["linear layer"]
    if not layers or stage.border is not None or (not stage.conv.kernel and stage.conv.groups > 1):
        return False
    if kinds["batch norm"] or any(map(_computes_weights, stage.nodes)):
        return True
    asymmetric = any(before != after for before, after in stage.conv.padding)
    written = 2 if stage.conv.pads and (asymmetric or stage.conv.padding_mode != "zeros") else 1
    return stage.branches > 1 or kinds.total() - kinds["identity"] > written


def _computes_weights(node: fx.Node) -> bool:
    """Whether a layer computes its weight from others in each pass, as weight norm and standardisation do."""
    if node.target not in LAYERS - NORMS:
        return False
    weight = arguments(node).get("weight", arguments(node).get("mat2"))
    return isinstance(weight, fx.Node) and weight.op != "get_attr" and weight.target is not torch.ops.aten.t.default
