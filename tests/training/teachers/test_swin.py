"""Swin teachers."""

import pytest

from kdexport.errors import ConfigError
from tests.training.teachers.described_teachers import built


@pytest.mark.parametrize("name", ["swin_t", "swin_s", "swin_b"])
@pytest.mark.parametrize("size", [32, 64, 127])
def test_a_swin_refuses_small_images(name: str, size: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{name} needs images of at least 128 pixels a side, but data\.image_size is {size}:"
    ):
        built(name, size, device="meta")
