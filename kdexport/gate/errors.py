"""Errors of the gate; their place in the tree is in ``kdexport.errors``."""

from kdexport.errors import KdexportError, MachineError


class MismatchError(KdexportError):
    """Two bundles, or a bundle and stored numbers, do not answer the same question."""

    code = "KDX204"
    exit_code = 2
    explanation = (
        "A gate compares two versions of one thing: the same student, the same classes in the same order, the same "
        "image size. A ratio between different students is a number without a meaning, so none is given."
    )


class ResolutionError(KdexportError):
    """A threshold lies below what this machine can tell apart."""

    code = "KDX350"
    exit_code = 3
    explanation = (
        "`kdexport calibrate-runner` measured how far equal arms differ on this machine and wrote it to runner.toml. A "
        "gate with a smaller threshold would end without a verdict in most runs, so it refuses to start. Raise "
        "--max-slowdown to what the message says, or calibrate a quieter machine."
    )


class RunnerError(MachineError):
    """This machine has fewer processors than a measurement asks for."""

    code = "KDX403"
    explanation = (
        "Sessions are held on as many processors as they have threads. With fewer processors the threads wait for each "
        "other, and what is measured is the scheduler."
    )
