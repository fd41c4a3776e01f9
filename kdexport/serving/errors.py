"""Errors of the server; their place in the tree is in ``kdexport.errors``."""

from kdexport.errors import KdexportError, MachineError


class RequestError(KdexportError):
    """The server refused a request; ``status`` is the HTTP status of the answer and ``reason`` its metric label."""

    code = "KDX210"
    exit_code = 2
    explanation = (
        "A request to `kdexport serve` was malformed, too large, too late or one too many. The body of the answer is "
        '{"error": "..."} and says what was measured against what is allowed. 429 and 503 carry Retry-After.'
    )

    def __init__(self, message: str, *, remedy: str = "", status: int = 400, reason: str = "invalid") -> None:
        super().__init__(message, remedy=remedy)
        self.status = status
        self.reason = reason


class ServerError(MachineError):
    """The server cannot run with these limits or on this address."""

    code = "KDX402"
    explanation = (
        "The address is taken or not of this machine, or the most memory that the limits of the server allow is above "
        "that of its container. The bound is computed from the limits before the first request; lower the limits that "
        "the message names, or give the container more."
    )
