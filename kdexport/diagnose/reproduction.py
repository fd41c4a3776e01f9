"""A wrong node as files that need only numpy and onnxruntime: graph, inputs, expected result, script."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from kdexport.graph.trace import Arrays, extract

GRAPH, INPUTS, EXPECTED, SCRIPT = "node.onnx", "inputs.npz", "expected.npz", "reproduce.py"

_TEMPLATE = '''"""{title}

Runs {graph} on {inputs} and compares the result with {expected}. Needs only numpy and onnxruntime.
Exit code 1: the fault is present. 0: it is fixed.
"""

import os
import pathlib
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime as ort

LIMIT = {limit!r}  # rms error relative to the expected result
folder = pathlib.Path(__file__).resolve().parent
with np.load(folder / "{inputs}") as stored:
    feeds = {{name: stored[name] for name in stored.files}}
with np.load(folder / "{expected}") as stored:
    name, wanted = next((name, stored[name].astype(np.float64)) for name in stored.files)
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
session = ort.InferenceSession(str(folder / "{graph}"), options, providers=["CPUExecutionProvider"])
found = session.run([name], {{key: feeds[key] for key in feeds}})[0].astype(np.float64)
with np.errstate(invalid="ignore", over="ignore"):
    error = np.sqrt(np.mean((found - wanted) ** 2)) / np.sqrt(np.mean(wanted**2))
off = not error <= LIMIT
verdict = "FAILS" if off else "holds"
sys.stdout.write(f"{{name}}: error {{error:.3g}} of the expected result, {{LIMIT:.3g}} allowed: {{verdict}}\\n")
sys.exit(1 if off else 0)
'''


def write_reproduction(
    folder: Path,
    model: onnx.ModelProto,
    tensor: str,
    given: Arrays,
    expected: NDArray[np.float32],
    *,
    image: int,
    limit: float,
    title: str,
) -> list[str]:
    """Write the four files for one image; return the operators of the small graph."""
    single = {name: value[image : image + 1] for name, value in given.items()}
    small = extract(model, tensor, single, local=True)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(small, str(folder / GRAPH))
    # npz keeps names with a slash, and ``stored.files`` returns them unchanged.
    np.savez_compressed(folder / INPUTS, **{value.name: single[value.name] for value in small.graph.input})  # type: ignore[arg-type]
    np.savez_compressed(folder / EXPECTED, **{tensor: expected[image : image + 1]})  # type: ignore[arg-type]
    script = _TEMPLATE.format(title=title, graph=GRAPH, inputs=INPUTS, expected=EXPECTED, limit=limit)
    (folder / SCRIPT).write_text(script, encoding="utf-8")
    return [node.op_type for node in small.graph.node]
