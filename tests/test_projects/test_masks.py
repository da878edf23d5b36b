"""Run-length codes of masks."""

import numpy as np
import pycocotools.mask as coco_mask
import torch
from hypothesis import given
from hypothesis import strategies as st

from projects.instance_segment_anything import decode_masks, encode_masks


@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_round_trip(count, height, width, seed):
    masks = torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed)) > 0.5
    codes = encode_masks(masks)
    assert np.array_equal(decode_masks(codes, (height, width)), masks.numpy())
    assert codes == [
        dict(size=code['size'], counts=code['counts'].decode())
        for code in (coco_mask.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8)) for mask in masks)
    ]
