"""Every error that kdexport raises on purpose, as one tree with stable codes.

KdexportError
|- ConfigError              KDX100  exit 2   a configuration, recipe or option is wrong
|  |- UnknownNameError      KDX101  exit 2   a name is not registered
|  `- UsageError            KDX102  exit 2   the command line is wrong
|- CheckpointError          KDX200  exit 2   a checkpoint is missing, truncated or of another model
|- DataError                KDX201  exit 2   a data set or an image cannot be used
|- OutputError              KDX202  exit 2   the output folder holds files that kdexport did not write
|- BundleError              KDX203  exit 2   a folder is not a readable bundle
|- MismatchError            KDX204  exit 2   two bundles cannot be compared with each other
|- RequestError             KDX210  exit 2   the server refused a request; it answers with its HTTP status
|- ReparamError             KDX300  exit 2   a module cannot be folded without changing its function
|- CheckError                       exit 1   a measured value is outside its limit
|  |- CertificateError      KDX301           the folded module differs from the unfolded one in float64
|  |- ExportError           KDX310           the exported graph differs from the folded module
|  |- AuditError            KDX311           a built file is not what the target requires
|  |- EngineBuildError      KDX320           a backend could not build or run the graph
|  |- VerificationError     KDX330           a rung of the parity ladder or the latency test failed
|  |- SignatureError        KDX332           a bundle is not signed, or not by the expected signer
|  `- TrainingError         KDX340           the training run diverged or ended early
|- ResolutionError          KDX350  exit 3   this machine cannot measure differences as small as the limit
|- NotExecutedError         KDX351  exit 3   a target that had to run did not run
|- UndecidedError           KDX352  exit 3   a measured value is beyond its budget, and the images do not decide it
|- MachineError                     exit 4   this machine lacks something
|  |- BackendUnavailableError  KDX400        a package, driver or GPU is missing
|  |- StorageError             KDX401        no space or no permission
|  |- ServerError              KDX402        the server cannot run with these limits or on this address
|  |- RunnerError              KDX403        this machine has fewer processors than a measurement needs
|  `- TransferError            KDX404        a hub or registry cannot be reached, or refuses
|- StoppedError             KDX410  exit 130 a signal stopped the command; 143 for SIGTERM
|- UnexpectedError          KDX900  exit 2   an error that no check covers
`- ForwardedError                            an error of a child process, with the child's code and exit code
"""

import re
from typing import ClassVar


class KdexportError(Exception):
    """Base of all errors: ``message`` is what happened, ``remedy`` what to do about it."""

    code: ClassVar[str] = "KDX000"
    exit_code: ClassVar[int] = 1
    #: What ``kdexport explain CODE`` prints.
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
        "A TOML file or an option has an unknown key, a value of a wrong type or a value out of range. Unknown keys "
        "are errors, because a key that is ignored is a setting that silently has no effect. The message names the key "
        "and the nearest known one."
    )


class UnknownNameError(ConfigError):
    """A student, teacher, distiller, target or recipe of this name does not exist."""

    code = "KDX101"
    explanation = (
        "The name is not registered. Run kdexport list KIND to see the registered names; KIND is students, teachers, "
        "distillers, targets or recipes. Target names are <backend>-<precision>, for example onnx-fp32 or trt-fp16."
    )


class UsageError(ConfigError):
    """The command line is wrong: an unknown command or option, a missing argument, or a value of a wrong type."""

    code = "KDX102"
    explanation = (
        "The command line could not be read, so nothing was started: the command or an option is unknown, an argument "
        "is missing, or a value has a wrong type or is out of range. kdexport --help lists the commands, and kdexport "
        "COMMAND --help the arguments and options of one."
    )


class CheckpointError(KdexportError):
    """A checkpoint is missing, truncated, or of another model."""

    code = "KDX200"
    exit_code = 2
    explanation = (
        "A student checkpoint is a folder with student.json and model.safetensors. Its tensors must match the student "
        "that student.json names: no tensor may be missing, unknown or of another shape or type, because kdexport "
        "never loads part of a checkpoint. Files of weights of other origins (.safetensors, .pt, .pth, .ckpt) are read "
        "without running any code of them; the dictionaries and prefixes around the weights are removed, and the "
        "tensors must then be exactly those of the network."
    )


class DataError(KdexportError):
    """A data set is missing, empty or unreadable, or an image is corrupt."""

    code = "KDX201"
    exit_code = 2
    explanation = (
        "A data set could not be read. A folder of images needs train/<class>/* and test/<class>/* (or val/<class>/*). "
        "A corrupt image ends the run with an error that names the file, because skipping it would silently change "
        "what is measured."
    )


class OutputError(KdexportError):
    """The output folder holds files that kdexport did not write."""

    code = "KDX202"
    exit_code = 2
    explanation = (
        "kdexport replaces only what it wrote itself (bundles, results of kdexport fuse, models in a Triton "
        "repository), and only when the new version is complete. It never replaces or deletes other files. Pass "
        "another --out, or move the folder away."
    )


class BundleError(KdexportError):
    """A folder is not a bundle, or its manifest cannot be read."""

    code = "KDX203"
    exit_code = 2
    explanation = (
        "A bundle is a folder written by kdexport build: manifest.json and the files that it lists. If the folder is a "
        "bundle, its manifest is damaged or was written by another version: build the bundle again."
    )


class MismatchError(KdexportError):
    """Two bundles, or a bundle and stored results, cannot be compared."""

    code = "KDX204"
    exit_code = 2
    explanation = (
        "A gate compares two versions of one model: the same student, the same classes in the same order and the same "
        "image size. A ratio between different models would have no meaning, so the gate ends with an error."
    )


class RequestError(KdexportError):
    """The server refused a request; ``status`` is the HTTP status of the answer and ``reason`` its metric label."""

    code = "KDX210"
    exit_code = 2
    explanation = (
        "A request to kdexport serve was malformed or too large, waited too long, or came while the server was at "
        'capacity. The body of the answer is {"error": "..."} with the measured value and its limit. Answers with '
        "status 429 or 503 have a Retry-After header."
    )

    def __init__(self, message: str, *, remedy: str = "", status: int = 400, reason: str = "invalid") -> None:
        super().__init__(message, remedy=remedy)
        self.status = status
        self.reason = reason


class ReparamError(KdexportError):
    """A module cannot be folded without changing its function."""

    code = "KDX300"
    exit_code = 2
    explanation = (
        "Folding is exact only for linear branches in evaluation mode: convolutions and batch norms with running "
        "statistics, each called once, without hooks, with no non-linear operation between them, and with results that "
        "nothing else reads. Other modules are refused; kdexport never merges approximately."
    )


class CheckError(KdexportError):
    """A measured value is outside its limit."""

    exit_code = 1


class CertificateError(CheckError):
    """The folded module differs from the unfolded one in float64."""

    code = "KDX301"
    explanation = (
        "In float64 a correct fold differs from the original only by rounding, about 1e-15 of the largest logit. The "
        "limit is 1e-9. A larger difference is an error in the algebra of the fold; the message names the block."
    )


class ExportError(CheckError):
    """The exported graph differs from the folded module."""

    code = "KDX310"
    explanation = (
        "kdexport checks the graph after the export: opset, input and output names, dynamic batch, no "
        "BatchNormalization, no branch, and every weight equal to the folded student's, bit by bit. The message names "
        "the check that failed."
    )


class AuditError(CheckError):
    """A built file is not what the target requires."""

    code = "KDX311"
    explanation = (
        "A layer runs in another precision, on another provider or in another form than the target requires, or a "
        "weight or scale cannot be written in that precision. docs/targets.md lists the checks of each target."
    )


class EngineBuildError(CheckError):
    """A backend could not build or run the graph."""

    code = "KDX320"
    explanation = (
        "The engine builder could not parse or build the graph, or this machine cannot run the engine. The message "
        "quotes the builder."
    )


class VerificationError(CheckError):
    """A rung of the parity ladder or the latency comparison failed."""

    code = "KDX330"
    explanation = (
        "Rung A compares the folded with the unfused student in float64. Rungs B (fp32) and C (low precision) compare "
        "each file with the float64 reference, in multiples of the error that the unfused model or a simulation of the "
        "precision has by itself. Rung D compares answers and accuracy on the validation set. docs/verification.md "
        "lists the limits. Run kdexport explain-failure BUNDLE to find the node where the difference starts."
    )


class SignatureError(CheckError):
    """A bundle has no signature, or one that the given key or certificates do not verify."""

    code = "KDX332"
    explanation = (
        "A signature (model.sig, made by kdexport sign) shows that the holder of a key signed exactly these files. It "
        "is checked before anything else is read. The message says what is wrong: no signature, another key, a "
        "certificate that has expired or does not lead to a trusted one, or files that differ from the signed ones. Do "
        "not use a bundle whose signature fails; docs/verification.md shows how to sign and check."
    )


class TrainingError(CheckError):
    """The training run diverged or ended early."""

    code = "KDX340"
    explanation = (
        "The training process ended before its last epoch. Its checkpoints are kept: run the same command again to "
        "continue from the last one."
    )


class ResolutionError(KdexportError):
    """A limit is below the smallest difference that this machine can measure."""

    code = "KDX350"
    exit_code = 3
    explanation = (
        "kdexport calibrate-runner measured how much identical models differ on this machine and wrote the result to "
        "runner.toml. With a smaller limit most runs of the gate would be inconclusive, so the gate does not start. "
        "Raise --max-slowdown to the value in the message, or calibrate a quieter machine."
    )


class NotExecutedError(KdexportError):
    """A target that had to run in this verification did not run."""

    code = "KDX351"
    exit_code = 3
    explanation = (
        "--require-executed names targets that must run in their own runtime while the bundle is verified. All other "
        "checks may hold, but without a run nothing shows what the target computes on this machine. Verify the bundle "
        "on a machine that has the runtime and, for engines, the GPU."
    )


class UndecidedError(KdexportError):
    """A measured value is beyond its budget, and the number of images does not show whether the true one is."""

    code = "KDX352"
    exit_code = 3
    explanation = (
        "Rung D compares the flips and the lost top-1 of a file with budgets. The measured value is beyond a budget, "
        "but an exact test at the confidence of the policy does not show that the true value is: with this few images "
        "a file within its budget gives such a value too often. Nothing failed, and nothing is shown. The bundle is "
        "complete and can be served. The detail of the check says which value this number of images can show. Use more "
        'validation images, or set a budget that these images can decide. on_inconclusive = "fail" under [D] of a '
        "policy makes such a check fail."
    )


class MachineError(KdexportError):
    """This machine lacks something."""

    exit_code = 4


class BackendUnavailableError(MachineError):
    """A package, driver or GPU is missing."""

    code = "KDX400"
    explanation = (
        "The target needs a package, driver or device that this machine does not have. kdexport never falls back to "
        "another device, precision or provider. Run kdexport doctor to see what this machine can build and run."
    )


class StorageError(MachineError):
    """There is no space or no permission to write."""

    code = "KDX401"
    explanation = (
        "A file could not be read or written. No partly written file was left, and an existing bundle is unchanged. "
        "Free some space or correct the permissions, then run the same command again."
    )


class ServerError(MachineError):
    """The server cannot run with these limits or on this address."""

    code = "KDX402"
    explanation = (
        "The address is in use or does not belong to this machine, or the memory that the server's limits allow is "
        "more than its container has. That memory is computed from the limits before the first request. Lower the "
        "limits that the message names, or give the container more memory."
    )


class RunnerError(MachineError):
    """This machine has fewer processors than a measurement needs."""

    code = "KDX403"
    explanation = (
        "A measurement is pinned to as many processors as it has threads. With fewer processors the threads would wait "
        "for each other, and the result would measure the scheduler. Use fewer threads or a machine with more "
        "processors."
    )


class TransferError(MachineError):
    """The Hugging Face Hub or a registry cannot be reached, does not have the name, or refuses."""

    code = "KDX404"
    explanation = (
        "kdexport push or pull could not reach or use the repository: there is no connection, the repository or tag "
        "does not exist, or you have no access. Log in with hf auth login (the Hub) or docker login HOST (a "
        "registry); kdexport reads those logins and never prints a token. Nothing was left at --out."
    )


class StoppedError(KdexportError):
    """A signal stopped the command; ``exit_code`` is 128 and its number, 130 for Ctrl-C and 143 for SIGTERM."""

    code = "KDX410"
    exit_code = 130
    explanation = (
        "Ctrl-C (SIGINT, exit 130), SIGTERM (exit 143) or a closed terminal (SIGHUP, exit 129) stopped the command. "
        "Its child processes have ended, its temporary folders are removed, and nothing was replaced. Finished steps "
        "of a build and epochs of a training are kept: run the same command again to continue."
    )

    def __init__(self, signal: str, exit_code: int) -> None:
        super().__init__(
            f"Interrupted by {'Ctrl-C' if signal == 'SIGINT' else signal}.",
            remedy="Run the same command again; finished steps of a build and epochs of a training are kept.",
        )
        self.exit_code = exit_code  # type: ignore[misc]


class UnexpectedError(KdexportError):
    """An error that no check covers."""

    code = "KDX900"
    exit_code = 2
    explanation = (
        "kdexport did not expect this error; no existing result was replaced. Run the same command with --debug to see "
        "where it was raised. If the input is right, open an issue in kdexport's repository and attach that output and "
        "the output of kdexport doctor."
    )

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"Unexpected {type(error).__name__}: {first_line(error)}",
            remedy="Check the input. If it is right, run the same command with --debug and open an issue in kdexport's "
            "repository with that output.",
        )
        self.__cause__ = error


class ForwardedError(KdexportError):
    """An error of a child process, with the child's code, exit code, message and remedy."""

    def __init__(self, message: str, *, remedy: str, code: str, exit_code: int) -> None:
        super().__init__(message, remedy=remedy)
        self.code = code  # type: ignore[misc]
        self.exit_code = exit_code  # type: ignore[misc]


def first_line(error: BaseException) -> str:
    """The first line of another library's message, without terminal colours; the name of the error if it is empty."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return next(iter(text.splitlines()), type(error).__name__)


def error_codes() -> dict[str, type[KdexportError]]:
    """All stable codes with their classes, sorted by code."""
    found: dict[str, type[KdexportError]] = {}
    pending: list[type[KdexportError]] = [KdexportError]
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if cls.explanation:
            found[cls.code] = cls
    return dict(sorted(found.items()))
