"""An exported program as an ONNX file, by the same rules as a student."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch.export import ExportedProgram

from kdexport.errors import ExportError, first_line
from kdexport.graph.export import INPUT, LOGITS, finish_onnx, quiet


def export_program(
    program: ExportedProgram, path: Path, *, opset: int, metadata: Mapping[str, object], weights: Sequence[str]
) -> onnx.ModelProto:
    """Write ``program`` to ``path``: dynamic where the program is, checked, with ``weights`` bit by bit.

    A single input is called ``input``; a single output (N,K) ``logits``, another one ``output``. Raises
    ``ExportError``.
    """
    outputs = [value.meta.get("val") for value in _outputs(program)]
    inputs = list(program.graph_signature.user_inputs)
    one = LOGITS if isinstance(outputs[0], torch.Tensor) and outputs[0].dim() == 2 else "output"
    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[INPUT] if len(inputs) == 1 else [str(name) for name in inputs],
                output_names=[one] if len(outputs) == 1 else [f"output_{index}" for index in range(len(outputs))],
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"The merged program cannot be written as ONNX: {first_line(error)}",
            remedy="An operator of it has no ONNX form in this opset; fuse_module gives the program without ONNX.",
        ) from error
    model = finish_onnx(exported, path, name="fused", opset=opset, metadata=metadata)
    _require_weights(model, {name: program.state_dict[name] for name in weights})
    return model


def _outputs(program: ExportedProgram) -> list[torch.fx.Node]:
    written = next(node for node in program.graph.nodes if node.op == "output")
    return [node for node in written.args[0] if isinstance(node, torch.fx.Node)]


def _require_weights(model: onnx.ModelProto, weights: Mapping[str, torch.Tensor]) -> None:
    stored = [numpy_helper.to_array(item) for item in model.graph.initializer]
    for name, value in weights.items():
        wanted = value.detach().cpu()
        # The exporter drops a bias of zeros, and numpy has no bfloat16.
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
                f"{name} of the merged program is not in the ONNX file bit by bit.",
                remedy="Report the module that shows it.",
            )
