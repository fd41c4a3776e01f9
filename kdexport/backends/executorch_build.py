"""The conversion of an ONNX graph to an ExecuTorch program, in a process of its own: it imports torch and compilers.

The answer on stdout names the operators that stayed outside of the XNNPACK delegate.
"""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from kdexport.core.console import print_json, quiet
from kdexport.errors import KdexportError, first_line


def build(onnx_file: Path, program: Path, image_size: int) -> dict[str, Any]:
    """Write the ``.pte`` of a float32 or int8-u8 graph for one image.

    Raises ``EngineBuildError`` for an operator that cannot be written as a torch program.
    """
    import onnx
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization import pt2e  # noqa: F401  registers the operators of levels

    from kdexport.backends.torch_programs.torch_graph import TorchGraph

    module = TorchGraph(onnx.load(str(onnx_file))).eval()
    exported = torch.export.export(module, (torch.zeros(1, 3, image_size, image_size),))
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    program.write_bytes(edge.to_executorch().buffer)
    return {}


def _main() -> None:
    onnx_file, program, size = sys.argv[1:]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        with quiet():
            answer = build(Path(onnx_file), Path(program), int(size))
    except KdexportError as error:
        answer = {"refused": error.message, "remedy": error.remedy}
    # Exporters and lowering passes raise dozens of types; the parent quotes the message.
    except Exception as error:  # noqa: BLE001
        answer = {"refused": f"ExecuTorch refused the graph: {type(error).__name__}: {first_line(error)}"}
    print_json(answer)


if __name__ == "__main__":
    _main()
