import numpy as np
import pytest

from kdexport.data.preprocessing import Preprocessing
from kdexport.data.synthetic_images import synthetic_images
from kdexport.data.uploads import ImageLimits, size_refusal


def of_size(size: int) -> Preprocessing:
    return Preprocessing.for_new_student(image_size=size, resize=size + 3, mean=(0.7, 0.5, 0.2), std=(0.1, 0.2, 0.05))


@pytest.mark.parametrize("size", [8, 32, 96])
def test_they_are_larger_than_the_input_and_a_server_takes_them(size: int) -> None:
    images = synthetic_images(of_size(size), 4)
    assert images.dtype == np.uint8
    count, height, width, channels = images.shape
    assert (count, channels) == (4, 3)
    assert min(height, width) > size
    assert height != width
    assert size_refusal(width, height, ImageLimits()) is None


def test_they_are_all_different_and_the_same_every_time() -> None:
    images = synthetic_images(of_size(32))
    assert len({image.tobytes() for image in images}) == len(images) == 32
    assert np.array_equal(images, synthetic_images(of_size(32)))


def test_their_colours_are_those_of_the_data_set() -> None:
    preprocessing = of_size(32)
    images = synthetic_images(preprocessing) / 255
    assert np.allclose(images.mean((0, 1, 2)), preprocessing.mean, atol=0.05)
    assert (images[1::2].std((0, 1, 2)) > np.array(preprocessing.std) / 2).all()
    assert (images.std((0, 1, 2)) < np.array(preprocessing.std) * 1.5).all()
