"""The nodes around an exported graph that give a file the input and the outputs that were asked for."""

import onnx

from kdexport.backends.file_interface import PROBABILITIES, FileInterface
from kdexport.backends.pixel_input import FLOAT32
from kdexport.data.preprocessing import Preprocessing
from kdexport.graph.pixel_prologue import take_pixels, without_prologue
from kdexport.graph.probability_output import give_probabilities, without_probabilities


def with_interface(model: onnx.ModelProto, interface: FileInterface, preprocessing: Preprocessing) -> onnx.ModelProto:
    """An exported ``model`` with ``interface``; pixels are normalised as ``preprocessing`` says."""
    if interface.takes != FLOAT32:
        size, mean, std = preprocessing.image_size, preprocessing.mean, preprocessing.std
        model = take_pixels(model, interface.takes, image_size=size, mean=mean, std=std)
    return give_probabilities(model) if interface.gives == PROBABILITIES else model


def without_interface(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` without the nodes of ``with_interface``; any other model as it is."""
    return without_prologue(without_probabilities(model))
