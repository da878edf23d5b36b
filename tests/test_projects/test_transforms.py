"""Images: SAM's resizing to the last bit, and files that are not images named in one line."""

import io

import numpy as np
import pytest
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide as Original

from projects.instance_segment_anything import LoadImage, ResizeLongestSide
from ptqsam.errors import AssetError


@pytest.mark.parametrize('shape', [(480, 640), (333, 500), (427, 427), (64, 100), (1, 9), (300, 225)])
@pytest.mark.parametrize('size', [64, 100, 1024])
def test_resizing_equals_segment_anything(shape, size):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    results = ResizeLongestSide(size).transform({'img': image})
    expected = Original(size).apply_image(image)
    assert np.array_equal(results['img'], expected)
    assert results['img_shape'] == expected.shape[:2]
    boxes = np.array([[0.0, 0.0, shape[1], shape[0]]])
    scaled = boxes * np.tile(results['scale_factor'], 2)
    assert np.array_equal(scaled, Original(size).apply_boxes(boxes, shape))


def png(height=6, width=8):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, 'png')
    return buffer.getvalue(), pixels


def test_loading(tmp_path):
    data, pixels = png()
    (tmp_path / 'a.png').write_bytes(data)
    results = LoadImage().transform({'img_path': str(tmp_path / 'a.png'), 'height': 6, 'width': 8})
    assert np.array_equal(results['img'], pixels[..., ::-1])
    assert results['ori_shape'] == results['img_shape'] == (6, 8)


@pytest.mark.parametrize(
    ('content', 'says'),
    [(None, 'is missing'), (b'', 'cannot decode'), (b'no image', 'cannot decode'), (png()[0][:60], 'cannot decode')],
)
def test_what_is_no_image_is_named(content, says, tmp_path):
    path = tmp_path / 'b.png'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AssetError, match=says) as error:
        LoadImage().transform({'img_path': str(path)})
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)


def test_truncated_jpeg_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, 'jpeg')
    (tmp_path / 'c.jpg').write_bytes(buffer.getvalue()[:-100])
    with pytest.raises(AssetError, match='cannot decode'):
        LoadImage().transform({'img_path': str(tmp_path / 'c.jpg')})


def test_image_of_another_size_than_annotated(tmp_path):
    (tmp_path / 'a.png').write_bytes(png()[0])
    with pytest.raises(AssetError, match=r'\(6, 8\).*annotations say \(8, 6\)'):
        LoadImage().transform({'img_path': str(tmp_path / 'a.png'), 'height': 8, 'width': 6})
