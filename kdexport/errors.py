"""Every error that kdexport raises on purpose, as one tree with stable codes.

KdexportError
|- ConfigError              KDX100  exit 2   a configuration, recipe or option is wrong
|  `- UnknownNameError      KDX101  exit 2   a name is in no registry
|- CheckpointError          KDX200  exit 2   a checkpoint is missing, truncated or foreign
|- DataError                KDX201  exit 2   a data set or an image cannot be used
|- OutputError              KDX202  exit 2   the output folder holds something that is not ours
|- BundleError              KDX203  exit 2   a folder is not a readable bundle
|- MismatchError            KDX204  exit 2   two bundles cannot be compared with each other
|- RequestError             KDX210  exit 2   the server refused a request; it answers with its HTTP status
|- ReparamError             KDX300  exit 2   a module cannot be folded without changing what it computes
|- CheckError                       exit 1   something was measured and is not allowed
|  |- CertificateError      KDX301           the folded module differs from the unfolded one in float64
|  |- ExportError           KDX310           the exported graph is not the folded module
|  |- AuditError            KDX311           what was built is not what was asked
|  |- EngineBuildError      KDX320           a backend refused the graph
|  |- VerificationError     KDX330           a rung of the parity ladder or the latency test failed
|  `- TrainingError         KDX340           the training run diverged or died
|- ResolutionError          KDX350  exit 3   this machine cannot see what a gate was asked to enforce
|- MachineError                     exit 4   this machine lacks something
|  |- BackendUnavailableError  KDX400        a package, driver or GPU is missing
|  |- StorageError             KDX401        no space or no permission
|  |- ServerError              KDX402        the server cannot run with these limits or on this address
|  `- RunnerError              KDX403        this machine has fewer processors than a measurement asks for
`- UnexpectedError             KDX900  exit 2   an input that no check had foreseen

Errors of the gate; their place in the tree is in ``kdexport.errors``.

Errors of the server; their place in the tree is in ``kdexport.errors``.
"""

import re
from typing import ClassVar


class KdexportError(Exception):
    """Base of all errors: what happened, and what to do about it."""

    code: ClassVar[str] = "KDX000"
    exit_code: ClassVar[int] = 1
    #: What ``kdexport explain CODE`` says.
    explanation: ClassVar[str] = ""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}"


class ConfigError(KdexportError):
    """A configuration file, a recipe or an option is wrong."""

    code = "KDX100"
    exit_code = 2
    explanation = (
        "A TOML file or an option has an unknown key, a wrong type or a value out of range. Unknown keys are never "
        "ignored, because an ignored key is a setting that silently does not hold. The message names the key and the "
        "nearest known one."
    )


class UnknownNameError(ConfigError):
    """A student, teacher, distiller, target or recipe of this name does not exist."""

    code = "KDX101"
    explanation = (
        "The name is in no registry. `kdexport list students|teachers|distillers|targets` prints those that are. "
        "Target names are <backend>-<precision>, for example onnx-fp32 or trt-fp16."
    )


class CheckpointError(KdexportError):
    """A checkpoint is missing, truncated, or belongs to another model."""

    code = "KDX200"
    exit_code = 2
    explanation = (
        "A student checkpoint is a directory with student.json and model.safetensors. All of its tensors must be those "
        "of the student it names, with no tensor missing, left over or of another shape: kdexport never loads a part "
        "of a checkpoint. Pickled files are read with weights_only=True, and only as teacher weights."
    )


class DataError(KdexportError):
    """A data set is missing, empty or unreadable, or an image is corrupt."""

    code = "KDX201"
    exit_code = 2
    explanation = (
        "A data set could not be read. Image folders hold train/<class>/* and test/<class>/* (or val/). A corrupt "
        "image stops the run with its name: skipping it would silently change what is measured."
    )


class OutputError(KdexportError):
    """The output folder holds something that is not a bundle."""

    code = "KDX202"
    exit_code = 2
    explanation = (
        "kdexport replaces what it wrote itself (bundles, results of fuse, models in a Triton repository), and only "
        "once the new one is complete. It does not replace or delete anything else."
    )


class BundleError(KdexportError):
    """A folder is not a bundle, or its manifest cannot be read."""

    code = "KDX203"
    exit_code = 2
    explanation = "A bundle is the folder that `kdexport build` writes: manifest.json beside the files that it lists."


class ReparamError(KdexportError):
    """A module cannot be folded without changing what it computes."""

    code = "KDX300"
    exit_code = 2
    explanation = (
        "Folding is exact only for linear branches in evaluation mode: convolution and batch norm with running "
        "statistics, each called once, with no hook, no other user and nothing non-linear between. Anything else is "
        "refused, never merged approximately."
    )


class CheckError(KdexportError):
    """Something was measured and lies outside what is allowed."""

    exit_code = 1


class CertificateError(CheckError):
    """The folded module differs from the unfolded one in float64."""

    code = "KDX301"
    explanation = (
        "In float64 a correct fold differs from the original by rounding alone, about 1e-15 of the largest logit. The "
        "limit is 1e-9. A failure is an algebra error; the message names the block."
    )


class ExportError(CheckError):
    """The exported graph is not the folded module."""

    code = "KDX310"
    explanation = (
        "After export the graph is checked: opset, input and output names, dynamic batch, no BatchNormalization, no "
        "branch, and every weight equal to the folded student's, bit by bit."
    )


class AuditError(CheckError):
    """What was built is not what was asked for."""

    code = "KDX311"
    explanation = (
        "A layer runs in another precision, on another provider or in another form than the target asks for, or a "
        "weight or scale cannot be written in that precision. docs/targets.md lists what each target is checked for."
    )


class EngineBuildError(CheckError):
    """A backend refused the graph."""

    code = "KDX320"
    explanation = "The engine builder could not parse or build the graph; its own messages are quoted."


class VerificationError(CheckError):
    """A rung of the parity ladder or the latency comparison failed."""

    code = "KDX330"
    explanation = (
        "Rung A compares the algebra in float64; B fp32 and C low precision with the float64 oracle, in multiples of "
        "the error that the unfused model or a simulation has itself; D flips and accuracy on the validation set by a "
        "policy (docs/verification.md). `kdexport explain-failure` names the node that is to blame."
    )


class TrainingError(CheckError):
    """The training run diverged or died."""

    code = "KDX340"
    explanation = "The training process ended early. Its checkpoints stay: the same command continues from the last."


class MachineError(KdexportError):
    """This machine lacks something."""

    exit_code = 4


class BackendUnavailableError(MachineError):
    """A package, driver or GPU is missing."""

    code = "KDX400"
    explanation = (
        "The target needs something that this machine does not have. kdexport never falls back to another device, "
        "precision or provider. `kdexport doctor` shows what is here."
    )


class StorageError(MachineError):
    """No space or no permission to write."""

    code = "KDX401"
    explanation = "A file could not be written. Nothing half-written is left and an existing bundle is untouched."


class UnexpectedError(KdexportError):
    """Something that kdexport did not foresee."""

    code = "KDX900"
    exit_code = 2
    explanation = "No check had foreseen this; nothing was replaced. `--debug` shows where; please report it."

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"Unexpected {type(error).__name__}: {first_line(error)}",
            remedy="Check the input. The same command with --debug shows the place; please report it.",
        )
        self.__cause__ = error


class ForwardedError(KdexportError):
    """An error of a child process, as it described it: its own code, exit code, message and remedy."""

    def __init__(self, message: str, *, remedy: str, code: str, exit_code: int) -> None:
        super().__init__(message, remedy=remedy)
        self.code = code  # type: ignore[misc]
        self.exit_code = exit_code  # type: ignore[misc]


def first_line(error: BaseException) -> str:
    """The first line of another library's message, without terminal colours; the name of the error if it is empty."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return next(iter(text.splitlines()), type(error).__name__)


def error_codes() -> dict[str, type[KdexportError]]:
    """All stable codes with their classes."""
    found: dict[str, type[KdexportError]] = {}
    pending: list[type[KdexportError]] = [KdexportError]
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if cls.explanation:
            found[cls.code] = cls
    return dict(sorted(found.items()))


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


class NotExecutedError(KdexportError):
    """A target that had to run in this verification did not."""

    code = "KDX351"
    exit_code = 3
    explanation = (
        "`--require-executed` names targets that must run in their own runtime while the bundle is verified. All other "
        "checks may hold: without a run, nothing shows what the target computes on this machine. Verify where the "
        "runtime, and for engines the GPU, is present."
    )


class RunnerError(MachineError):
    """This machine has fewer processors than a measurement asks for."""

    code = "KDX403"
    explanation = (
        "Sessions are held on as many processors as they have threads. With fewer processors the threads wait for each "
        "other, and what is measured is the scheduler."
    )


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
