"""What the file of a target takes and gives: its input, and logits alone or probabilities beside them."""

from dataclasses import dataclass
from typing import Literal

from kdexport.backends.base import LOGITS
from kdexport.backends.pixel_input import FLOAT32, InputKind

#: What a file gives: logits (N,K), or probabilities (N,K) and then logits.
OutputKind = Literal["logits", "probabilities"]
PROBABILITIES: OutputKind = "probabilities"
#: The entry of an ONNX file's metadata that says what it gives; a file without it gives logits.
OUTPUT_KEY = "kdexport.output"


@dataclass(frozen=True, slots=True)
class FileInterface:
    """The input and the outputs of a target's file; by default those of the graph that is exported."""

    takes: InputKind = FLOAT32
    gives: OutputKind = "logits"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs, in their order. Logits are always one of them: all checks compare logits."""
        return (PROBABILITIES, LOGITS) if self.gives == PROBABILITIES else (LOGITS,)

    def __str__(self) -> str:
        return f"{self.takes} input, {' and '.join(self.outputs)}"


#: Normalised float32 images to logits.
PLAIN_INTERFACE = FileInterface()
