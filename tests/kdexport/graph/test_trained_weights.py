"""Trained weights take the places of the folded ones in the graph and in the state of the student."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from kdexport.errors import AuditError
from kdexport.graph.trained_weights import trained_state, with_weights

RNG = np.random.default_rng(3)
STORED = {
    "conv.weight": RNG.normal(size=(4, 3, 2, 2)).astype(np.float32),
    "tokens.weight.T": RNG.normal(size=(5, 7)).astype(np.float32),
    "shared.bias": RNG.normal(size=6).astype(np.float32),
    "val_3": np.asarray(0.5, np.float32),
}


def graph() -> onnx.ModelProto:
    constants = [numpy_helper.from_array(values, name) for name, values in STORED.items()]
    constants.append(numpy_helper.from_array(np.asarray([1, -1], np.int64), "shape"))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    return helper.make_model(
        helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value], constants)
    )


def state() -> dict[str, torch.Tensor]:
    return {
        "conv.weight": torch.from_numpy(STORED["conv.weight"]),
        "tokens.weight": torch.from_numpy(STORED["tokens.weight.T"].T.copy()),
        "shared.bias": torch.from_numpy(STORED["shared.bias"]),
        # The exporter stores equal tensors once.
        "twin.bias": torch.from_numpy(STORED["shared.bias"].copy()),
        "dropped.bias": torch.zeros(6),
    }


def test_trained_tensors_reach_the_state_and_from_it_the_graph() -> None:
    trained = {name: torch.from_numpy(STORED[name] * 3 + 1) for name in STORED if name != "val_3"}
    after = trained_state(state(), graph(), trained)
    assert torch.equal(after["conv.weight"], trained["conv.weight"])
    assert torch.equal(after["tokens.weight"], trained["tokens.weight.T"].T)
    assert torch.equal(after["twin.bias"], trained["shared.bias"])
    assert torch.equal(after["dropped.bias"], torch.zeros(6))
    made = with_weights(graph(), {name: value.numpy() for name, value in after.items()})
    found = {item.name: numpy_helper.to_array(item) for item in made.graph.initializer}
    assert all(np.array_equal(found[name], trained[name].numpy()) for name in trained)
    assert found["val_3"] == np.float32(0.5)
    assert found["shape"].tolist() == [1, -1]


def test_a_tensor_of_another_student_is_refused() -> None:
    with pytest.raises(AuditError, match=r"conv\.weight is \[2, 2\], not \[4, 3, 2, 2\]"):
        with_weights(graph(), {"conv.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(AuditError, match="the tensor val_3, which is not a weight of the folded student"):
        trained_state(state(), graph(), {"val_3": torch.zeros(())})
