"""One comparison of a measured value with the value allowed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from kdexport.backends.base import Finding
from kdexport.errors import KdexportError, MachineError, UndecidedError, UnknownNameError

T = TypeVar("T")

_UNDECIDED_REMEDY = (
    "Build with more validation images, or set a budget that these images can decide: [policy.D.PRECISION] of the "
    "export configuration, or for a finished bundle kdexport verify BUNDLE --rethreshold POLICY --allow-looser."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One comparison: ``measured`` against ``allowed``, both in ``unit``; ``detail`` names the layer or input."""

    rung: str
    subject: str
    name: str
    holds: bool
    measured: float
    allowed: float
    unit: str
    detail: str = ""
    #: This number of images neither confirms nor refutes the statement; the policy decides whether the check holds.
    undecided: bool = False
    #: Undecided, and the measured value is beyond the limit: the check does not hold, and it did not fail either.
    beyond: bool = False
    #: False if it did not run, for example because this machine lacks a library: it neither holds nor failed.
    ran: bool = True

    @property
    def failed(self) -> bool:
        """Whether the check shows that the statement is false."""
        return self.ran and not self.holds and not self.beyond

    @property
    def line(self) -> str:
        """The measured value against the allowed one, for an error message."""
        return (
            f"  {self.rung} {self.subject}: {self.name} {self.measured:.3g} (up to {self.allowed:.3g} {self.unit} "
            f"allowed) {self.detail}".rstrip()
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object; numbers that are not finite become null, because JSON cannot hold them."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def has_run(stored: Mapping[str, Any]) -> bool:
    """Whether a check of a manifest ran; every one of an earlier version did."""
    return stored.get("ran", True) is not False


def has_failed(stored: Mapping[str, Any]) -> bool:
    """Whether a check of a manifest failed; one beyond its limit that is undecided, or that did not run, did not."""
    return not stored.get("holds") and not stored.get("beyond") and has_run(stored)


def check_at_most(
    rung: str, subject: str, name: str, measured: float, allowed: float, *, unit: str, detail: str = ""
) -> Check:
    """A check that ``measured`` <= ``allowed``; NaN never holds."""
    return Check(
        rung=rung,
        subject=subject,
        name=name,
        holds=bool(measured <= allowed),
        measured=float(measured),
        allowed=float(allowed),
        unit=unit,
        detail=detail,
    )


def from_finding(subject: str, finding: Finding, *, rung: str = "audit") -> Check:
    """The check of a finding: its number of faults, 0 or 1, against 0; NaN if it was not counted."""
    return Check(
        rung=rung,
        subject=subject,
        name=finding.check,
        holds=finding.holds,
        measured=float(not finding.holds) if finding.ran else math.nan,
        allowed=0.0,
        unit="faults",
        detail=finding.fact,
        ran=finding.ran,
    )


def broken(rung: str, subject: str, fact: str) -> Check:
    """The failed check of a file that cannot be read or run."""
    return from_finding(subject, Finding("readable", False, fact), rung=rung)


def attempt(rung: str, subject: str, run: Callable[[], T]) -> "T | Check":
    """The result of ``run``, or a failed check of ``subject`` where it raises an exception.

    The readers of ONNX, safetensors, images and engine tables raise exceptions of many types for a damaged file. Errors
    of the machine are raised as they are, and so is an unknown name, which a plugin may have: neither shows that the
    file is wrong.
    """
    try:
        return run()
    except (MachineError, MemoryError, UnknownNameError, ModuleNotFoundError):
        raise
    except KdexportError as error:
        return broken(rung, subject, error.message)
    except FileNotFoundError as error:
        return broken(rung, subject, f"{error.filename} is missing")
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001
        return broken(rung, subject, f"cannot be checked: {type(error).__name__}: {error}")


def require_decided(stored: Sequence[Mapping[str, Any]], remedy: str = "") -> None:
    """Raise ``UndecidedError`` if one of the checks of a manifest is beyond its limit and undecided."""
    lines = [Check(**check).line for check in stored if check.get("beyond")]
    if lines:
        raise UndecidedError(
            "\n".join(
                [f"{len(lines)} of {len(stored)} checks are beyond their limit, undecided with these images:", *lines]
            ),
            remedy=remedy or _UNDECIDED_REMEDY,
        )
