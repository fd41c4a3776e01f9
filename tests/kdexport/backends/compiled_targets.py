"""Files of the edge backends that their tests share, compiled from one network."""

import shutil
from pathlib import Path

from kdexport.backends import backend
from kdexport.backends.base import ONNX_FILE, CompileRequest
from kdexport.graph.precision import cast_to_fp16
from kdexport.graph.quantize import parse_form, quantize
from kdexport.graph.tensor_ranges import calibrate
from tests.kdexport.graph.int8_block import CALIBRATION, SIZE, block_graph


def compiled(
    name: str, source: Path, precision: str, folder: Path, *, size: int = SIZE, kept: tuple[str, ...] = ()
) -> Path:
    """The ONNX file of a precision in the form of the backend ``name``, and the backend's files of it, in ``folder``;
    returns the one that its runtime opens.
    """
    runtime, path = backend(name), folder / ONNX_FILE
    folder.mkdir()
    if precision == "fp16":
        cast_to_fp16(source, path)
    elif precision == "int8":
        calibrate(source, [CALIBRATION], folder / "ranges.json", method="minmax", percentile=99.9)
        quantize(source, folder / "ranges.json", path, form=parse_form(runtime.form("int8")), keep=kept)
    else:
        shutil.copyfile(source, path)
    runtime.compile(
        CompileRequest(onnx=path, folder=folder, precision=precision, image_size=size, batches=(1, 1, 8), kept=kept)
    )
    return folder / runtime.artifact


def compiled_blocks(name: str, root: Path) -> dict[str, Path]:
    """The residual network of the int8 tests for the backend ``name``, by precision."""
    source = block_graph(root / "block.onnx")
    return {precision: compiled(name, source, precision, root / precision) for precision in backend(name).precisions}
