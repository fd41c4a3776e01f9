"""Open Inference Protocol v2: the typed request header, and what may be asked of a classifier.

Fields and meaning: kserve/open-inference-protocol (REST), with Triton's extensions for binary
tensors and classification.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdexport.serving.errors import RequestError
from kdexport.serving.limits import Limits

_MAX_NAME = 256
#: Largest value of a dimension or byte count that a header may name; products stay far below 2^63 in Python anyway.
_MAX_COUNT = 2**40

Name = Annotated[str, Field(max_length=_MAX_NAME)]
Scalar = bool | int | float | str
Parameters = Annotated[dict[Name, Scalar], Field(max_length=64)]


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)


class TensorParameters(_Message):
    """Parameters of one input: only a binary size changes its meaning."""

    binary_data_size: Annotated[int, Field(ge=0, le=_MAX_COUNT)] | None = None
    shared_memory_region: str | None = None


class RequestInput(_Message):
    """One input tensor; ``data`` is absent where its bytes follow the header."""

    name: Name
    shape: Annotated[list[Annotated[int, Field(ge=0, le=_MAX_COUNT)]], Field(max_length=64)]
    datatype: Annotated[str, Field(max_length=16)]
    parameters: TensorParameters = TensorParameters()
    data: Any = None


class OutputParameters(_Message):
    """Parameters of one wanted output."""

    binary_data: bool | None = None
    classification: Annotated[int, Field(ge=0, le=_MAX_COUNT)] = 0
    shared_memory_region: str | None = None


class RequestOutput(_Message):
    """One wanted output."""

    name: Name
    parameters: OutputParameters = OutputParameters()


class InferParameters(_Message):
    """Parameters of the request; others are allowed by the protocol and change nothing here."""

    binary_data_output: bool = False
    timeout: Annotated[int, Field(ge=0, le=_MAX_COUNT)] = 0
    sequence_id: int | str = 0


class InferRequest(_Message):
    """The JSON part of an inference request."""

    id: Annotated[str, Field(max_length=1024)] | None = None
    inputs: Annotated[list[RequestInput], Field(min_length=1, max_length=1024)]
    outputs: Annotated[list[RequestOutput], Field(max_length=1024)] = []
    parameters: InferParameters = InferParameters()


def parse_header(data: bytes | memoryview, limits: Limits, max_elements: int) -> InferRequest:
    """The JSON of a request as ``InferRequest``; raises ``RequestError`` with the first fault.

    Tokens and depth are counted before any object is made of them, so that memory follows from the limits.
    """
    raw = bytes(data)
    require_modest(raw, limits, max_elements)
    try:
        return InferRequest.model_validate_json(raw)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"][:6])[:200]
        raise RequestError(f"The request is not valid: {place + ': ' if place else ''}{fault['msg'][:300]}.") from None


def require_modest(raw: bytes, limits: Limits, max_elements: int) -> None:
    """Raise where JSON has more tokens than a request can need, or nests deeper than allowed."""
    openers = raw.count(b"[") + raw.count(b"{")
    tokens = raw.count(b",") + openers
    allowed = 2 * max_elements + limits.json_slack
    if tokens > allowed:
        raise RequestError(
            f"The JSON has {tokens:,} elements (up to {allowed:,} allowed).", status=413, reason="too_large"
        )
    if openers > limits.json_depth and _depth(raw) > limits.json_depth:
        raise RequestError(f"The JSON nests deeper than {limits.json_depth} levels.", reason="too_deep")


def _depth(raw: bytes) -> int:
    """Deepest nesting; brackets inside strings count too, which only ever overstates it."""
    import numpy as np

    codes = np.frombuffer(raw, np.uint8)
    up = (codes == ord("[")) | (codes == ord("{"))
    down = (codes == ord("]")) | (codes == ord("}"))
    places = np.flatnonzero(up | down)
    steps = np.where(up[places], 1, -1)
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))


def require_answerable(request: InferRequest, output_name: str, limits: Limits) -> None:
    """Raise ``RequestError`` for what a stateless classifier with one input and one output cannot do."""
    if len(request.inputs) != 1:
        raise RequestError(f"The request has {len(request.inputs)} inputs (1 allowed).")
    if len(request.inputs[0].shape) > limits.dims:
        raise RequestError(f"The input has {len(request.inputs[0].shape)} dimensions (up to {limits.dims} allowed).")
    if len(request.outputs) > limits.tensors:
        raise RequestError(f"The request wants {len(request.outputs)} outputs (up to {limits.tensors} allowed).")
    names = [output.name for output in request.outputs]
    if len(set(names)) != len(names):
        raise RequestError("An output is asked for twice.")
    for name in names:
        if name != output_name:
            raise RequestError(f"There is no output {name[:80]!r}; the model has {output_name!r}.")
    if request.parameters.sequence_id not in (0, ""):
        raise RequestError("The model keeps no state: sequence_id cannot be used.")
    regions = [request.inputs[0].parameters.shared_memory_region]
    regions += [output.parameters.shared_memory_region for output in request.outputs]
    if any(region is not None for region in regions):
        raise RequestError("Shared memory is not served; send the tensor in the body.")
