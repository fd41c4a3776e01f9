"""Finds in a functional graph what can be merged: layers in sequence, parallel branches, batch norms.

Each value is a sum of paths of linear layers, from values that something else computes. A value that more than one
operator reads is such a source, because it must exist anyway.
"""

from dataclasses import dataclass

from torch import fx

from kdexport.errors import ReparamError
from kdexport.reparam.evaluation import Evaluation
from kdexport.reparam.operators import Concat, Layer, Operator, Sum, Surroundings
from kdexport.reparam.paths import Path, Reasons, Shapes, Stage, Term, extend, merge_terms, side_by_side
from kdexport.reparam.reading import read


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
    """What to rewrite, in the order of the graph, and what stays."""

    rewrites: tuple[Rewrite, ...]
    left_alone: tuple[LeftAlone, ...]


def find_merges(evaluation: Evaluation) -> Plan:
    """Everything that is merged in the graph that ``evaluation`` has run."""
    return _Search(evaluation).plan()


class _Search:
    def __init__(self, evaluation: Evaluation) -> None:
        self._graph = evaluation.graph
        self._around = Surroundings(evaluation)
        self._shapes: Shapes = evaluation.shapes
        self._terms: dict[fx.Node, list[Term]] = {}
        self._operators: dict[fx.Node, Operator] = {}
        self._reasons: Reasons = {}

    def plan(self) -> Plan:
        for node in self._graph.nodes:
            try:
                operator = read(node, self._around)
            except ReparamError as error:
                self._reasons[node] = error.message
                continue
            if operator is not None:
                self._operators[node] = operator
                terms = self._value(node, operator)
                if terms is not None:
                    self._terms[node] = terms
        rewrites = tuple(reversed(self._live_rewrites()))
        left = [LeftAlone(self._around.place(node), reason) for node, reason in self._reasons.items()]
        return Plan(rewrites, tuple(dict.fromkeys(left)))

    def _value(self, node: fx.Node, operator: Operator) -> list[Term] | None:
        if isinstance(operator, Layer):
            before = self._path(operator.source, len(operator.source.users) == 1)
            path = extend(before, operator, self._shapes, self._reasons)
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
            self._explain_sum(node, terms)
            return None
        return tuple(term.path for term in terms)

    def _explain_sum(self, node: fx.Node, terms: list[Term]) -> None:
        sources = list(dict.fromkeys(term.path.source.name for term in terms))
        if len(sources) > 1:
            self._reasons.setdefault(node, f"It adds values that start at different places ({', '.join(sources[:3])}).")


def is_rewritten(stage: Stage) -> bool:
    """Whether the stage becomes a new convolution; otherwise its nodes stay."""
    kinds = stage.kinds
    if stage.border is not None or (not stage.conv.kernel and stage.conv.groups > 1):
        return False
    if kinds["batch norm"]:
        return True
    asymmetric = any(before != after for before, after in stage.conv.padding)
    written = 2 if stage.conv.pads and (asymmetric or stage.conv.padding_mode != "zeros") else 1
    layers = kinds["convolution"] + kinds["linear layer"]
    return layers > 0 and (stage.branches > 1 or kinds.total() - kinds["identity"] > written)
