"""Results that a test gives to the stages after them."""

import shutil
from pathlib import Path

from kdexport.build.artifacts import OnnxModel
from kdexport.workspace import Making, Step


def given_model(path: Path, name: str = "m") -> Step[OnnxModel]:
    """The float32 ONNX file at ``path`` as a step of its own, told from others by ``name``."""

    def make(making: Making) -> None:
        shutil.copyfile(path, making.folder / "model.onnx")

    return Step(
        stage="given",
        made_of=(name,),
        make=make,
        read=lambda folder: OnnxModel(path=folder / "model.onnx", form="fp32"),
    )
