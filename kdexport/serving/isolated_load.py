"""Load a bundle completely in a separate process, before the server opens it.

A graph that crashes onnxruntime ends that process, not the server. The process also finds the largest error that the
logits of the golden images may have.
"""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kdexport.backends.ort import TENSORRT
from kdexport.bundle.manifest import MODEL
from kdexport.core.child import ChildDiedError, ChildTimeoutError, call
from kdexport.core.console import guarded, print_json
from kdexport.errors import AuditError, BundleError
from kdexport.serving.limits import Limits
from kdexport.targets import DEFAULT_TARGET, require_servable
from kdexport.verify.golden_limits import allowed_error

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

_log = logging.getLogger("kdexport.serving")
_TIMEOUT_SECONDS = 120
#: Building an engine of TensorRT times its kernels.
_ENGINE_TIMEOUT_SECONDS = 1800


def try_bundle(
    folder: Path,
    provider: str,
    limits: Limits,
    target: str = DEFAULT_TARGET,
    trusted: Path | None = None,
    engines: Path | None = None,
) -> float:
    """Load ``folder`` in a child process; returns the largest error of a logit that its golden images may have.

    An engine that this builds is in ``engines`` afterwards, if that is given.

    Raises the child's error, or ``BundleError`` if the child died.
    """
    settings = [str(folder), provider, json.dumps(asdict(limits)), target]
    settings += ["" if path is None else str(path) for path in (trusted, engines)]
    try:
        answer = call(
            "kdexport.serving.isolated_load",
            settings,
            timeout_s=_ENGINE_TIMEOUT_SECONDS if provider == TENSORRT else _TIMEOUT_SECONDS,
            environment={"OMP_NUM_THREADS": "1"},
        )
    except ChildTimeoutError as error:
        raise BundleError(
            f"Loading {folder} took more than {error.seconds:g} s.",
            remedy="Try it again on a machine with less load; if it still does, build the bundle again.",
        ) from None
    except ChildDiedError as error:
        # The message below can reach clients (/v2/repository/index); what another library printed can not.
        _log.error("Output of the process that loaded %s: %s", folder, error.stderr)
        raise BundleError(
            f"The process that loaded {folder} crashed (exit code {error.exit_code}).",
            remedy="Build the bundle again; the server's log has the output of the process.",
        ) from None
    return float(answer["allowed_error"])


def _tensors(message: "Message") -> "Iterator[onnx.TensorProto]":
    """Every tensor below ``message``: initializers, attributes, subgraphs, functions, sparse and training tensors."""
    import onnx
    from google.protobuf.message import Message

    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for item in [value] if isinstance(value, Message) else value:
            if isinstance(item, onnx.TensorProto):
                yield item
            else:
                yield from _tensors(item)


def require_one_file(graph: bytes) -> None:
    """Raise ``AuditError`` for a graph with weights in other files, custom operators or functions."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    model = onnx.ModelProto.FromString(graph)
    if any(uses_external_data(tensor) for tensor in _tensors(model)):
        raise AuditError(
            f"{MODEL} stores weights in other files; the server takes graphs of one file only.",
            remedy="Build the bundle again.",
        )
    foreign = sorted({entry.domain for entry in model.opset_import} - {"", "ai.onnx"})
    if foreign:
        raise AuditError(
            f"{MODEL} uses the operator sets {', '.join(foreign)}; only ONNX's own is allowed.",
            remedy="Build the bundle again.",
        )
    if model.functions:
        raise AuditError(
            f"{MODEL} defines {len(model.functions)} functions of its own; none are allowed.",
            remedy="Build the bundle again.",
        )


def _main() -> None:
    from kdexport.serving.loading import as_kdexport_error, load, read_files, without_library_text

    folder, provider, limits, target = Path(sys.argv[1]), sys.argv[2], Limits(**json.loads(sys.argv[3])), sys.argv[4]
    trusted, engines = (Path(text) if text else None for text in sys.argv[5:7])
    try:
        require_servable(target, provider)
        files = read_files(folder, target, trusted)
        require_one_file(files.graph)
        allowed = allowed_error(folder, files.manifest, target)
        load(
            folder, name=folder.name, version=1, provider=provider, limits=limits, allowed_error=allowed, target=target,
            trusted=trusted, engines=engines,
        )  # fmt: skip
    except Exception as error:
        raise without_library_text(as_kdexport_error(error, folder), folder) from error
    print_json({"allowed_error": allowed})


if __name__ == "__main__":
    guarded(_main)
