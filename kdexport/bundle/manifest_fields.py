"""The types of all fields of a manifest that kdexport reads.

Further keys are allowed, because a later version may add them. Fields with a default are missing in bundles of earlier
versions. Numbers may be infinite or NaN: the manifest of a failed build says what was measured.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdexport.backends.file_interface import OutputKind
from kdexport.backends.pixel_input import FLOAT32, InputKind

MAX_BATCH = 4096

Count = Annotated[int, Field(ge=0, le=2**53)]
Batch = Annotated[int, Field(ge=1, le=MAX_BATCH)]
#: Powers of two beyond those that float32 has make no sense.
Exponent = Annotated[int, Field(ge=-300, le=300)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class _Export(_Fields):
    min_batch: Batch
    opt_batch: Batch
    max_batch: Batch
    tf32: bool = False


class _Block(_Fields):
    name: str
    kind: str
    relative_error: float


class _Hazard(_Fields):
    layer: str
    kind: str
    detail: str


class _Certificate(_Fields):
    blocks: list[_Block]
    whole_relative_error: float
    limit: float
    unfused_parameters: Count
    fused_parameters: Count
    hazards: list[_Hazard] = []


class _Operators(_Fields):
    unfused: dict[str, Count]
    fused: dict[str, Count]


class _Execution(_Fields):
    runtime: str
    version: str
    device: str


#: The percentage of a tensor's values inside its range.
_Percentile = Annotated[float, Field(gt=50, le=100)]


class _Chosen(_Fields):
    method: Literal["minmax", "entropy", "percentile"]
    percentile: _Percentile


class _Calibration(_Fields):
    weight_bits: Annotated[int, Field(ge=2, le=8)]
    method: Literal["minmax", "entropy", "percentile", "auto"] = "minmax"
    percentile: _Percentile = 100.0
    #: What ``auto`` found.
    chosen: _Chosen | None = None

    @model_validator(mode="after")
    def _chosen_by_auto(self) -> "_Calibration":
        if self.method == "auto" and self.chosen is None:
            raise ValueError("the method auto needs chosen")
        return self


class _QuantizeAware(_Fields):
    #: The file with the folded weights of this target.
    weights: str
    teacher: str
    epochs: Count


class _Kept(_Fields):
    node: str
    weight: str


class _Scaling(_Fields):
    first: list[str]
    second: str
    groups: Annotated[int, Field(ge=1, le=2**31)]
    exponents: list[Exponent]


class _Trade(_Fields):
    kept: list[str]
    equalised: Count
    top1: float
    flips: float
    noise: float | None
    divergence: float | None
    bytes: Count
    latency_ms: float | None


class _SearchBudget(_Fields):
    flips: float
    top1_drop: float
    noise: float | None


class _Plan(_Fields):
    kept: list[_Kept]
    equalised: list[_Scaling]
    collapsed: bool
    reasons: list[str]
    float32: _Trade
    trades: Annotated[list[_Trade], Field(min_length=1)]
    chosen: Count
    budget: _SearchBudget
    images: Count

    @model_validator(mode="after")
    def _has_the_chosen_trade(self) -> Self:
        if self.chosen >= len(self.trades):
            raise ValueError(f"chosen is {self.chosen}, and there are {len(self.trades)} trades")
        return self


class _Compiled(_Fields):
    artifact_sha256: str
    onnx_sha256: str


class _GoldenRun(_Fields):
    runtime: str
    version: str
    device: str
    processor: str


class _Target(_Fields):
    precision: str
    engine: bool
    status: str
    input: InputKind = FLOAT32
    output: OutputKind = "logits"
    executed: _Execution | None = None
    compiled: _Compiled | None = None
    golden: _GoldenRun | None = None
    calibration: _Calibration | None = None
    quantize_aware: _QuantizeAware | None = None
    plan: _Plan | None = None

    @model_validator(mode="after")
    def _omits_what_it_lacks(self) -> Self:
        empty = sorted(name for name in self.model_fields_set if getattr(self, name) is None)
        if empty:
            raise ValueError(f"{empty[0]} is null")
        return self


class _Check(_Fields):
    rung: str
    subject: str
    name: str
    holds: bool
    #: null where the number is not finite.
    measured: float | None
    allowed: float | None
    unit: str
    detail: str
    undecided: bool = False
    beyond: bool = False
    ran: bool = True

    @model_validator(mode="after")
    def _holds_for_a_number(self) -> Self:
        if self.holds and self.measured is None:
            raise ValueError("holds is true, and measured is null")
        if not self.ran and (self.holds or self.beyond or self.measured is not None):
            raise ValueError("ran is false, and the check holds, is beyond its limit, or has a measured value")
        if self.beyond and (self.holds or not self.undecided or self.rung != "D"):
            raise ValueError("beyond is true, and the check is not an undecided one of rung D that does not hold")
        return self


class _TaskFile(_Fields):
    precision: str
    unit_error: float
    top1: float
    flips: Count
    mean_divergence: float


class _Task(_Fields):
    images: Count
    reference_top1: float
    own_error: float
    files: dict[str, _TaskFile]
    data_sha256: str = ""
    data_images: Count = 0


class _Answers(_Fields):
    version: Count
    images: Count
    top: Count
    files: list[str]


class _Machine(_Fields):
    cpu: str
    cores: Count
    system: str
    onnxruntime: str
    gpu: str = ""


class _TargetTime(_Fields):
    clock: str
    ms: float
    sessions: Count
    #: Against onnx-fp32, where both run on one clock.
    ratio: float | None


class _TargetTimes(_Fields):
    #: When, in UTC: 2026-11-29T20:15:00Z.
    measured: str
    batch: Count
    threads: Count
    machine: _Machine
    targets: dict[str, _TargetTime]
    #: Why the others were not timed.
    not_timed: dict[str, str]


class _Latency(_Fields):
    clock: str
    batch: Count
    threads: Count
    sessions: Count
    ratio: float
    low: float
    high: float
    reference_ms: float
    candidate_ms: float
    max_slowdown: float
    mde: float
    verdict: str


class _Metrics(_Fields):
    top1: float = 0.0
    teacher_top1: float = 0.0


class _Provenance(_Fields):
    checkpoint_sha256: str = ""
    metrics: _Metrics = _Metrics()


class _GoldenImages(_Fields):
    kind: Literal["validation", "synthetic"]
    #: In the validation split; none for synthetic images.
    positions: list[Count]


class _Slim(_Fields):
    manifest_sha256: str
    left_out: list[str]


class ManifestFields(_Fields):
    """A manifest. ``student`` and ``policy`` are read by ``StudentSpec`` and ``Policy``, which know their fields."""

    schema_version: int
    build_key: str
    opset: Annotated[int, Field(ge=1, le=1000)]
    student: dict[str, Any]
    provenance: _Provenance
    export: _Export
    targets: dict[str, _Target]
    golden: Annotated[list[str], Field(min_length=1)]
    golden_images: _GoldenImages | None = None
    golden_passed_over: dict[str, Count] = {}
    golden_refused: dict[str, Count] = {}
    certificate: _Certificate
    operators: _Operators
    parity: list[_Check]
    parity_images: Count
    latency: _Latency | None
    task: _Task | None = None
    #: The likeliest classes of each image, in a file of their own.
    answers: _Answers | None = None
    target_times: _TargetTimes | None = None
    #: Positions in the validation split of the images that report.html shows.
    report_images: list[Count] = []
    slim: _Slim | None = None
    policy: dict[str, Any] = {}
    versions: dict[str, str]
    files: dict[str, str]

    @model_validator(mode="after")
    def _has_the_images_of_undecided_checks(self) -> Self:
        if self.task is None and any(check.undecided for check in self.parity):
            raise ValueError("a check is undecided, and there is no task")
        return self


def require_fields(data: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` that names the first field of a manifest that is missing or has a wrong type or value."""
    try:
        ManifestFields.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the manifest"
        problem = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{place}: {problem[:1].lower()}{problem[1:]}") from None
