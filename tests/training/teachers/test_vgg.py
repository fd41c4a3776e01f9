"""VGG teachers."""

import pytest

from tests.training.teachers.described_teachers import built


@pytest.mark.parametrize("name", ["vgg8", "vgg13"])
def test_a_small_vgg_pools_four_times_from_64_pixels_on(name: str) -> None:
    strides = {size: [tap.stride for tap in built(name, size, device="meta").taps] for size in (32, 63, 64)}
    assert strides == {32: [1, 2, 4, 8, 8], 63: [1, 2, 4, 8, 8], 64: [1, 2, 4, 8, 16]}
