"""What a file of teacher weights says about its teacher: classes and preprocessing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdexport.checkpoint import load_metadata
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import CheckpointError
from kdexport.origins.file_formats import weight_format

#: The key of the description in the metadata of a .safetensors file. It is the only key, because the order of several
#: keys is random, and equal runs must write equal files.
_KEY = "kdexport.teacher"


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherDescription:
    """The ordered classes and the preprocessing that a teacher was trained with; None for what is not known."""

    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None

    def metadata(self, name: str) -> dict[str, str]:
        """The metadata of a .safetensors file with weights of the teacher ``name``; ``described_teacher`` reads it."""
        return {_KEY: json.dumps(self.to_json(name), sort_keys=True)}

    def to_json(self, name: str) -> dict[str, Any]:
        """The description of the teacher ``name`` as a JSON object."""
        return {
            "teacher": name,
            "classes": None if self.classes is None else list(self.classes),
            "preprocessing": None if self.preprocessing is None else self.preprocessing.to_json(),
        }


def described_teacher(path: Path) -> TeacherDescription:
    """The description in the metadata of the weights ``path``, or else in the teacher.json in their folder.

    Only ``python -m training`` writes either; a teacher.json belongs to the model.safetensors beside it. Files of
    earlier versions have only a teacher.json, without the preprocessing. Raises ``CheckpointError`` if a description
    cannot be read.
    """
    beside = path.parent / "teacher.json"
    text = load_metadata(path).get(_KEY) if path.exists() and weight_format(path) == "safetensors" else None
    source = f"The metadata of {path}"
    try:
        if text is None:
            if path.name != "model.safetensors" or not beside.is_file():
                return TeacherDescription()
            text, source = beside.read_text(), str(beside)
        data = json.loads(text)
        classes, preprocessing = data["classes"], data.get("preprocessing")
        return TeacherDescription(
            classes=None if classes is None else tuple(str(name) for name in classes),
            preprocessing=None if preprocessing is None else Preprocessing.from_json(preprocessing),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{source} cannot be read ({type(error).__name__}).",
            remedy="Remove the file, or train the teacher again.",
        ) from error
