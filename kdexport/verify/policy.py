"""The limits of the ladder as one typed table, for a build and for a later check of a finished bundle."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from kdexport.core.toml import Settings, parse, read_toml

Factor = Annotated[float, Field(gt=0, le=1000)]
Share = Annotated[float, Field(ge=0, le=1)]

#: Precisions that rung D has budgets for, among them TF32: a float32 graph whose products keep 10 bits of mantissa.
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")


class AlgebraPolicy(Settings):
    """``[A]``: float64 error of the merge, relative to the largest output. It can only be lowered."""

    relative_error: Annotated[float, Field(gt=0, le=1e-9)] = 1e-9


class Fp32Policy(Settings):
    """``[B]``: error against the float64 oracle, in multiples of the unfused fp32 model's own error."""

    rms_error: Factor = 2.0
    max_error: Factor = 4.0


class LowPolicy(Settings):
    """``[C]``: error against the oracle, in multiples of the simulated error.

    In fp16 the largest activation allowed is 65504 / ``headroom``.
    """

    rms_error: Factor = 3.0
    max_error: Factor = 4.0
    headroom: Annotated[float, Field(ge=1, le=65504)] = 8.0


class Budget(Settings):
    """``[D.<precision>]``: limits of this precision on the validation set, as fractions of the images."""

    flips: Share
    top1_drop: Share


class TaskPolicy(Settings):
    """``[D]``: the task. ``confidence`` is the confidence of each one-sided bound.

    ``unexplained_flips`` limits the flips whose reference margin is larger than any error that rungs B and C allow can
    overturn. ``on_inconclusive`` decides a check that this number of images neither confirms nor refutes: with
    "pass" it holds if the measured value is within the limit and is reported as beyond it otherwise, with "fail" it
    fails.
    """

    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    unexplained_flips: Annotated[int, Field(ge=0)] = 0
    on_inconclusive: Literal["pass", "fail"] = "pass"
    fp32: Budget = Budget(flips=0.001, top1_drop=0.001)
    tf32: Budget = Budget(flips=0.005, top1_drop=0.002)
    fp16: Budget = Budget(flips=0.005, top1_drop=0.002)
    bf16: Budget = Budget(flips=0.03, top1_drop=0.002)
    int8: Budget = Budget(flips=0.1, top1_drop=0.005)

    def budget(self, precision: str) -> Budget:
        """The budget of ``precision``."""
        found: Budget = getattr(self, precision)
        return found


class Policy(Settings):
    """All limits of the ladder; a build uses the defaults unless its configuration sets others."""

    A: AlgebraPolicy = AlgebraPolicy()
    B: Fp32Policy = Fp32Policy()
    C: LowPolicy = LowPolicy()
    D: TaskPolicy = TaskPolicy()


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One limit that differs between two policies."""

    key: str
    old: float | str
    new: float | str
    loosens: bool

    def __str__(self) -> str:
        shown = [f"{value:g}" if isinstance(value, float | int) else value for value in (self.new, self.old)]
        return f"{self.key} is {shown[0]} instead of {shown[1]}"


#: Limits where a larger value is stricter.
_STRICTER_UPWARDS = {"C.headroom", "D.confidence"}

DEFAULT = Policy()


def parse_policy(given: Mapping[str, Any], source: str, base: Policy = DEFAULT) -> Policy:
    """``base`` with the limits that ``given`` sets; raises ``ConfigError`` for unknown keys."""
    return parse(Policy, _filled(given, base.model_dump()), source)


def load_policy(path: Path, base: Policy) -> Policy:
    """``base`` with the limits that a policy file sets."""
    return parse_policy(read_toml(path), str(path), base)


def stored_policy(data: Mapping[str, Any]) -> Policy:
    """The policy in a manifest; the defaults for bundles of earlier versions, which store none."""
    return parse_policy(data.get("policy", {}), "manifest.json: policy")


def policy_changes(old: Policy, new: Policy) -> tuple[Change, ...]:
    """Every limit that differs between ``old`` and ``new``, and whether the new one is looser."""
    before, after = dict(_flat(old.model_dump())), dict(_flat(new.model_dump()))
    return tuple(
        Change(key=key, old=before[key], new=value, loosens=_loosens(key, before[key], value))
        for key, value in after.items()
        if value != before[key]
    )


def looser_than_default(policy: Policy) -> tuple[Change, ...]:
    """The limits of ``policy`` that are looser than the default ones."""
    return tuple(change for change in policy_changes(DEFAULT, policy) if change.loosens)


def _loosens(key: str, old: float | str, new: float | str) -> bool:
    if isinstance(old, str) or isinstance(new, str):
        return new == "pass"
    return new < old if key in _STRICTER_UPWARDS else new > old


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _filled(given: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in given.items():
        known = base.get(key)
        merged[key] = _filled(value, known) if isinstance(value, Mapping) and isinstance(known, Mapping) else value
    return merged
