"""What is not a number, as a check: statements about files, and files that cannot be read."""

from kdexport.graph.audit import Finding
from kdexport.verify.parity import Check


def from_finding(subject: str, finding: Finding) -> Check:
    """A statement about a file as a check of the audit."""
    return Check(
        rung="audit",
        subject=subject,
        name=finding.check,
        holds=finding.holds,
        measured=float(not finding.holds),
        allowed=0.0,
        unit="faults",
        detail=finding.fact,
    )


def broken(rung: str, subject: str, fact: str) -> Check:
    """A failed check of something that could not even be read."""
    return (
        from_finding(subject, Finding("readable", False, fact))
        if rung == "audit"
        else Check(
            rung=rung,
            subject=subject,
            name="readable",
            holds=False,
            measured=1.0,
            allowed=0.0,
            unit="faults",
            detail=fact,
        )
    )
