"""The folded student as an ONNX file: one file, dynamic batch, no trace of the machine that wrote it."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import torch
from torch import nn

from kdexport import __version__
from kdexport.checkpoint import StudentSpec
from kdexport.errors import ExportError
from kdexport.fingerprint import digest

INPUT, LOGITS, BATCH = "input", "logits", "batch"


def export_onnx(
    module: nn.Module, path: Path, *, image_size: int, opset: int, metadata: Mapping[str, object]
) -> onnx.ModelProto:
    """Export an eval-mode module to ``path`` with input (batch,3,S,S) and output logits (batch,K), float32.

    ``metadata`` goes into metadata_props, values as JSON. The file is checked with the full checker and its opset is
    asserted, because the exporter answers an opset that it cannot write with another one. Raises ``ExportError``.
    """
    example = torch.zeros(2, 3, image_size, image_size)
    with quiet():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[LOGITS],
            dynamic_shapes=({0: torch.export.Dim(BATCH, min=1)},),
        )
    return finish_onnx(program, path, name="student", opset=opset, metadata=metadata)


def finish_onnx(
    program: torch.onnx.ONNXProgram | None, path: Path, *, name: str, opset: int, metadata: Mapping[str, object]
) -> onnx.ModelProto:
    """Write what the exporter made to ``path``, as graph ``name``, without traces of this machine, and check it."""
    import onnx_ir.passes.common as passes

    if program is None:
        raise ExportError("torch.onnx returned no program.", remedy="Report the module that shows it.")
    # Node metadata carries stack traces with absolute paths.
    passes.ClearMetadataAndDocStringPass()(program.model)
    program.model.graph.name = name
    for key in sorted(metadata):
        program.model.metadata_props[f"kdexport.{key}"] = json.dumps(metadata[key], sort_keys=True)
    program.save(str(path), external_data=False)
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    written = {entry.domain: entry.version for entry in model.opset_import}
    if written.get("") != opset:
        raise ExportError(
            f"Opset {opset} was asked for and {written} was written.", remedy="Set [export] opset to 18 or later."
        )
    return model


def model_metadata(spec: StudentSpec, checkpoint_sha256: str) -> dict[str, object]:
    """What an ONNX file says about itself in metadata_props; digests and names, no place on this machine."""
    recipe = spec.provenance.get("recipe")
    return {
        "version": __version__,
        "student": spec.student,
        "classes": list(spec.classes),
        "preprocessing": spec.preprocessing.to_json(),
        "provenance": {
            "checkpoint_sha256": checkpoint_sha256,
            "recipe_sha256": digest(recipe),
            "dataset_sha256": spec.provenance.get("dataset_sha256"),
            "teacher_sha256": spec.provenance.get("teacher_sha256"),
        },
    }


def read_metadata(model: onnx.ModelProto) -> dict[str, object]:
    """kdexport's entries of metadata_props."""
    prefix = "kdexport."
    return {
        entry.key.removeprefix(prefix): json.loads(entry.value)
        for entry in model.metadata_props
        if entry.key.startswith(prefix)
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter prints and warns about its own internals; real failures raise."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
