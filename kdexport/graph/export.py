"""Export to ONNX: a folded student, or a merged ``torch.export`` program.

The result is one file with a dynamic batch, without paths of the machine that wrote it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, TensorArgument

from kdexport import __version__
from kdexport.backends.base import BATCH, INPUT, LOGITS
from kdexport.checkpoint import StudentSpec
from kdexport.core.console import quiet
from kdexport.core.digests import digest
from kdexport.errors import ConfigError, ExportError, first_line
from kdexport.graph.plan import TRANSPOSED


def export_onnx(
    module: nn.Module, path: Path, *, image_size: int, opset: int, metadata: Mapping[str, object]
) -> onnx.ModelProto:
    """Export an eval-mode module to ``path`` with input (batch,3,S,S) and output logits (batch,K), float32.

    ``metadata`` is stored in metadata_props, values as JSON. The file must pass the full checker and have the
    requested opset: the exporter silently writes a different one if it does not support it. Raises ``ExportError``.
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
    model = finish_onnx(program, path, name="student", opset=opset, metadata=metadata)
    if _name_transposed(model, module):
        onnx.save(model, str(path))
    return model


def _name_transposed(model: onnx.ModelProto, module: nn.Module) -> bool:
    """Name each matrix that the exporter stored with its axes swapped after the weight; return whether there is one.

    A linear layer on tokens becomes a product with the transposed weight, stored under a number.
    """
    weights = {name: value.detach().cpu().numpy() for name, value in module.state_dict().items() if value.dim() == 2}
    known = {*module.state_dict(), *(name for node in model.graph.node for name in node.output)}
    fresh: dict[str, str] = {}
    for item in model.graph.initializer:
        if item.name in known or len(item.dims) != 2 or item.data_type != onnx.TensorProto.FLOAT:
            continue
        stored = numpy_helper.to_array(item)
        found = (name for name, value in weights.items() if np.array_equal(stored, value.T))
        name = next((name for name in found if f"{name}{TRANSPOSED}" not in fresh.values()), "")
        if name:
            fresh[item.name] = f"{name}{TRANSPOSED}"
            item.name = fresh[item.name]
    for node in model.graph.node:
        node.input[:] = [fresh.get(name, name) for name in node.input]
    for value in model.graph.value_info:
        value.name = fresh.get(value.name, value.name)
    return bool(fresh)


def finish_onnx(
    program: torch.onnx.ONNXProgram | None, path: Path, *, name: str, opset: int, metadata: Mapping[str, object]
) -> onnx.ModelProto:
    """Write an exported program to ``path`` as graph ``name``, without paths of this machine, and check the file."""
    import onnx_ir.passes.common as passes

    if program is None:
        raise ExportError(
            "torch.onnx.export returned no program.",
            remedy="Open an issue in the repository of kdexport with the module and the version of torch.",
        )
    # Node metadata contains stack traces with absolute paths.
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
            f"The exporter wrote opset {written.get('')}; opset {opset} was requested.",
            remedy="Set opset = 18 or later under [export].",
        )
    return model


def model_metadata(spec: StudentSpec, checkpoint_sha256: str) -> dict[str, object]:
    """The metadata_props of an ONNX file: names and digests, no path of this machine."""
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
    """The entries of metadata_props that kdexport wrote."""
    prefix = "kdexport."
    return {
        entry.key.removeprefix(prefix): json.loads(entry.value)
        for entry in model.metadata_props
        if entry.key.startswith(prefix)
    }


def export_program(
    program: ExportedProgram, path: Path, *, opset: int, metadata: Mapping[str, object], weights: Sequence[str]
) -> onnx.ModelProto:
    """Write ``program`` to ``path`` with its dynamic dimensions, and check that ``weights`` are in it bit by bit.

    A single input is called ``input``; a single output is called ``logits`` if it is (N,K), otherwise ``output``.
    Raises ``ConfigError`` for outputs and types that ONNX does not have, and ``ExportError``.
    """
    _require_onnx_types(program, opset)
    outputs = [value.meta.get("val") for value in _outputs(program)]
    inputs = list(program.graph_signature.user_inputs)
    single = LOGITS if isinstance(outputs[0], torch.Tensor) and outputs[0].dim() == 2 else "output"
    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[INPUT] if len(inputs) == 1 else [str(name) for name in inputs],
                output_names=[single] if len(outputs) == 1 else [f"output_{index}" for index in range(len(outputs))],
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"torch.onnx cannot write the merged program: {first_line(_root_cause(error))}",
            remedy="Replace the operator that ONNX lacks in this opset, or use fuse_module, which needs no ONNX.",
        ) from error
    model = finish_onnx(exported, path, name="fused", opset=opset, metadata=metadata)
    _require_weights(model, {name: program.state_dict[name] for name in weights})
    return model


def _require_onnx_types(program: ExportedProgram, opset: int) -> None:
    for index, spec in enumerate(program.graph_signature.output_specs):
        # The exporter drops None.
        constant = isinstance(spec.arg, ConstantArgument)
        if not isinstance(spec.arg, TensorArgument) and not (constant and spec.arg.value is None):
            found = f"{spec.arg.value!r} ({type(spec.arg.value).__name__})" if constant else "a size"
            raise ConfigError(
                f"Output {index} of the program is {found}; an ONNX file can have only tensors as outputs.",
                remedy="Let forward() return tensors only, or call fuse_module in Python, which writes no ONNX file.",
            )
    narrow = next((name for name, value in program.state_dict.items() if value.dtype == torch.bfloat16), None)
    if narrow is not None:
        raise ConfigError(
            f"Weight {narrow} is bfloat16, and opset {opset} of ONNX has no bfloat16 convolution.",
            remedy="Return module.float() from the factory; the precision of a target is set when the ONNX file is "
            "compiled.",
        )


def _root_cause(error: BaseException) -> BaseException:
    # The message of the exporter lists its steps; the failure itself is at the end of the chain.
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _outputs(program: ExportedProgram) -> list[torch.fx.Node]:
    written = next(node for node in program.graph.nodes if node.op == "output")
    return [node for node in written.args[0] if isinstance(node, torch.fx.Node)]


def _require_weights(model: onnx.ModelProto, weights: Mapping[str, torch.Tensor]) -> None:
    stored = [numpy_helper.to_array(item) for item in model.graph.initializer]
    for name, value in weights.items():
        wanted = value.detach().cpu()
        # The exporter drops a bias of zeros, and numpy does not support bfloat16.
        if wanted.dtype == torch.bfloat16 or not wanted.any():
            continue
        array = wanted.numpy()
        if not any(
            item.dtype == array.dtype
            and item.size == array.size
            and (np.array_equal(item, array) or np.array_equal(item.T, array))
            for item in stored
        ):
            raise ExportError(
                f"The ONNX file does not contain {name} of the merged program bit by bit.",
                remedy="Open an issue in the repository of kdexport with the module and the version of torch.",
            )
