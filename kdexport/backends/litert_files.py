"""LiteRT's files: their tables in memory, how a new one is written, and what is read back from one.

The tables are those of the schema in ``ai_edge_litert``, a flatbuffer. One subgraph, channels last.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.errors import AuditError, BackendUnavailableError

INSTALL = "Run pip install 'kdexport[litert]'"
_IDENTIFIER = b"TFL3"
#: Kernels read weights where the file lies in memory, and expect them at such addresses.
_ALIGNMENT = 16
#: The largest code that the field of former versions holds.
_FORMER_CODES = 127


def import_schema() -> Any:
    """The tables of the schema; raises ``BackendUnavailableError`` without ``ai_edge_litert``."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError:
        raise BackendUnavailableError("ai-edge-litert is not installed.", remedy=f"{INSTALL}.") from None
    return schema_py_generated


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor of a file: its name, its type as in the schema, its shape, and its values if they are in the file.

    ``scales`` and ``zeros`` are those of levels, one or one for each place along ``axis``; empty without levels.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    values: NDArray[Any] | None
    scales: NDArray[np.float32]
    zeros: NDArray[np.int64]
    axis: int

    @property
    def levels(self) -> tuple[float, int] | None:
        """Scale and zero point of a tensor that has one of each."""
        return (float(self.scales[0]), int(self.zeros[0])) if self.scales.size == 1 and self.zeros.size == 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """An operator of a file: its kind, the places of the tensors it reads and writes, and its options."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Any


@dataclass(frozen=True, slots=True, eq=False)
class LiteModel:
    """The one subgraph of a file."""

    tensors: tuple[Stored, ...]
    operations: tuple[Operation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def makers(self) -> dict[int, Operation]:
        """The operator that writes each tensor."""
        return {place: operation for operation in self.operations for place in operation.outputs}


_TYPES: dict[str, Any] = {
    "FLOAT32": np.float32, "FLOAT16": np.float16, "INT8": np.int8, "INT32": np.int32,
}  # fmt: skip


def read_model(data: bytes) -> LiteModel:
    """What a file contains; raises ``AuditError`` for one that is damaged or has more than kdexport writes."""
    schema, model = import_schema(), _tables(data)
    try:
        (graph,) = model.subgraphs
        kinds, types = _names(schema.BuiltinOperator), _names(schema.TensorType)
        codes = [kinds[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
        return LiteModel(
            tensors=tuple(_stored(tensor, model.buffers, types) for tensor in graph.tensors),
            operations=tuple(
                Operation(codes[o.opcodeIndex], _ints(o.inputs), _ints(o.outputs), o.builtinOptions)
                for o in graph.operators
            ),
            inputs=_ints(graph.inputs),
            outputs=_ints(graph.outputs),
        )
    # The tables of a damaged file hold whatever its bytes mean.
    except Exception as error:
        raise _unreadable(error) from error


def _names(table: Any) -> dict[int, str]:
    return {value: name for name, value in vars(table).items() if not name.startswith("_")}


def _ints(values: Iterable[Any] | None) -> tuple[int, ...]:
    return () if values is None else tuple(int(value) for value in values)


def _stored(tensor: Any, buffers: Sequence[Any], types: dict[int, str]) -> Stored:
    kind, shape = types[tensor.type], _ints(tensor.shape)
    raw = buffers[tensor.buffer].data
    values: NDArray[Any] | None = None
    if raw is not None and len(raw):
        values = np.frombuffer(np.asarray(raw, np.uint8).tobytes(), _TYPES[kind]).reshape(shape)
    given = tensor.quantization
    scales = None if given is None else given.scale
    zeros = None if given is None else given.zeroPoint
    return Stored(
        name=tensor.name.decode(),
        kind=kind,
        shape=shape,
        values=values,
        scales=np.zeros(0, np.float32) if scales is None else np.asarray(scales, np.float32),
        zeros=np.zeros(0, np.int64) if zeros is None else np.asarray(zeros, np.int64),
        axis=0 if given is None else int(given.quantizedDimension),
    )


def table_difference(found: bytes, expected: bytes) -> str:
    """Where the tables of two files differ first; empty if they are equal, however they lie in the files.

    Raises ``AuditError`` if one cannot be read.
    """
    one, other = _tables(found), _tables(expected)
    return _different(one, other, "")


def _tables(data: bytes) -> Any:
    schema = import_schema()
    try:
        if data[4:8] != _IDENTIFIER:
            raise ValueError("it does not begin as a file of LiteRT")
        return schema.ModelT.InitFromObj(schema.Model.GetRootAs(data))
    # A reader of flatbuffers raises whatever its position leads to.
    except Exception as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> AuditError:
    return AuditError(
        f"The model cannot be read: {type(error).__name__}: {error}.",
        remedy="The file is damaged; build the bundle again.",
    )


def _different(found: Any, expected: Any, where: str) -> str:
    if isinstance(found, np.ndarray) or isinstance(expected, np.ndarray):
        one, other = np.asarray(found), np.asarray(expected)
        same = one.shape == other.shape and one.tobytes() == other.tobytes()
        return "" if same else f"{where} differs"
    if isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            return f"{where} has {len(found)} entries, expected {len(expected)}"
        parts = (_different(*pair, f"{where}[{at}]") for at, pair in enumerate(zip(found, expected, strict=True)))
        return next(filter(None, parts), "")
    if type(found) is type(expected) and hasattr(found, "__dict__"):
        tables = (vars(found), vars(expected))
        parts = (_different(tables[0].get(key), tables[1].get(key), f"{where}.{key}".lstrip(".")) for key in tables[1])
        return next(filter(None, parts), "")
    # Numbers of flatbuffers may be those of numpy or of Python.
    same = bool(found == expected)
    return "" if same else f"{where} is {found!r}, expected {expected!r}"


class ModelWriter:
    """Collects tensors and operators, and packs them into a file."""

    def __init__(self) -> None:
        self.schema = import_schema()
        self._tensors: list[Any] = []
        #: The first buffer is that of tensors without values.
        self._buffers: list[NDArray[np.uint8] | None] = [None]
        self._codes: dict[tuple[str, int], int] = {}
        self._operators: list[Any] = []

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        kind: str,
        *,
        values: NDArray[Any] | float | None = None,
        scales: NDArray[Any] | Sequence[float] = (),
        zeros: Sequence[int] = (),
        axis: int = 0,
    ) -> int:
        """Add a tensor and return its place; with ``values`` they are in the file."""
        schema = self.schema
        made = schema.TensorT()
        made.name, made.shape = name, np.asarray(shape, np.int32)
        made.type = getattr(schema.TensorType, kind)
        made.buffer = 0
        if values is not None:
            made.buffer = len(self._buffers)
            self._buffers.append(np.frombuffer(np.ascontiguousarray(values, _TYPES[kind]).tobytes(), np.uint8))
        if len(scales):
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale = np.asarray(scales, np.float32)
            made.quantization.zeroPoint = np.asarray(zeros or [0] * len(scales), np.int64)
            made.quantization.quantizedDimension = axis
        self._tensors.append(made)
        return len(self._tensors) - 1

    def operation(
        self,
        kind: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: str = "",
        *,
        version: int = 1,
        **values: Any,
    ) -> None:
        """Add an operator; ``options`` is the name of its table in the schema, ``values`` its fields."""
        schema = self.schema
        made = schema.OperatorT()
        made.opcodeIndex = self._codes.setdefault((kind, version), len(self._codes))
        made.inputs, made.outputs = np.asarray(inputs, np.int32), np.asarray(outputs, np.int32)
        if options:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            made.builtinOptions = getattr(schema, f"{options}T")()
            for name, value in values.items():
                setattr(made.builtinOptions, name, value)
        self._operators.append(made)

    def packed(self, inputs: Sequence[int], outputs: Sequence[int], description: str) -> bytes:
        """The bytes of the file."""
        import flatbuffers

        schema = self.schema
        graph, model = schema.SubGraphT(), schema.ModelT()
        graph.tensors, graph.operators, graph.name = self._tensors, self._operators, "main"
        graph.inputs, graph.outputs = np.asarray(inputs, np.int32), np.asarray(outputs, np.int32)
        model.version, model.description, model.subgraphs = 3, description, [graph]
        model.operatorCodes = [self._code(kind, version) for kind, version in self._codes]
        model.buffers = [_aligned(schema, data) for data in self._buffers]
        builder = flatbuffers.Builder(sum(0 if data is None else data.size for data in self._buffers) + 65536)
        builder.Finish(model.Pack(builder), _IDENTIFIER)
        return bytes(builder.Output())

    def _code(self, kind: str, version: int) -> Any:
        code, number = self.schema.OperatorCodeT(), getattr(self.schema.BuiltinOperator, kind)
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, _FORMER_CODES), version
        return code


def _aligned(schema: Any, data: NDArray[np.uint8] | None) -> Any:
    """A buffer whose values begin at a multiple of ``_ALIGNMENT``, which the generated table does not see to."""

    class Aligned(schema.BufferT):  # type: ignore[misc]
        def Pack(self, builder: Any) -> Any:  # noqa: N802  the schema's name
            place = None
            if data is not None:
                builder.StartVector(1, data.size, _ALIGNMENT)
                builder.head -= data.size
                builder.Bytes[builder.head : builder.head + data.size] = data.tobytes()
                place = builder.EndVector()
            schema.BufferStart(builder)
            if place is not None:
                schema.BufferAddData(builder, place)
            return schema.BufferEnd(builder)

    return Aligned()
