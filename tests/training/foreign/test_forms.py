import pytest
import torch

from kdexport.errors import ConfigError
from training.foreign.forms import Form, form_of


def test_a_map_with_channels_last_is_turned() -> None:
    output = torch.arange(2 * 4 * 4 * 3.0).reshape(2, 4, 4, 3)
    form = form_of(output, 2, "layer")
    assert form == Form(kind="channels last", channels=3, side=4)
    feature = form.feature(output)
    assert feature.shape == (2, 3, 4, 4)
    assert feature[1, 2, 3, 0] == output[1, 3, 0, 2]


@pytest.mark.parametrize(("length", "prefix", "extra"), [(9, None, 0), (10, None, 1), (14, 5, 5)])
def test_tokens_become_a_map_without_their_class_tokens(length: int, prefix: int | None, extra: int) -> None:
    output = torch.arange(2 * length * 7.0).reshape(2, length, 7)
    form = form_of(output, 2, "block", prefix)
    assert (form.kind, form.channels, form.side, form.prefix) == ("tokens", 7, 3, extra)
    feature = form.feature(output)
    # The token after the prefix is the upper left corner, the next one is to its right.
    assert torch.equal(feature[:, :, 0, 0], output[:, extra])
    assert torch.equal(feature[:, :, 1, 2], output[:, extra + 5])


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ((torch.zeros(2, 3), 1), "returns a tuple, not one tensor"),
        (torch.zeros(2, 5, 5, 5), "cannot be told apart"),
        (torch.zeros(2, 3, 4, 5), "is not a square map"),
        (torch.zeros(2, 8, 16), "8 tokens are not a square map"),
        (torch.zeros(9, 2, 16), "its first axis is not the batch"),
        (torch.zeros(2, 16), "neither a map nor tokens"),
    ],
)
def test_what_is_ambiguous_is_refused_by_name(output: object, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        form_of(output, 2, "stages.1")
    assert "The tap 'stages.1'" in caught.value.message
    assert reason in caught.value.message


def test_the_layer_that_wrote_a_map_decides_where_both_forms_are_possible() -> None:
    output = torch.zeros(2, 5, 5, 5)
    assert form_of(output, 2, "layer", writes_maps=True).kind == "maps"
    assert form_of(output, 2, "layer", writes_maps=False).kind == "channels last"
    # It does not overrule a shape that is clear.
    assert form_of(torch.zeros(2, 5, 4, 4), 2, "layer", writes_maps=False).kind == "maps"


@pytest.mark.parametrize(
    ("side", "size", "stride"),
    [(8, 64, 8), (7, 50, 8), (4, 30, 8), (2, 48, 32), (3, 30, 10), (35, 299, None)],
)
def test_a_stride_is_one_that_gives_the_size_of_the_map(side: int, size: int, stride: int | None) -> None:
    assert Form(kind="maps", channels=3, side=side).stride(size) == stride
