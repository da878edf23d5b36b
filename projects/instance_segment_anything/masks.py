"""Masks as COCO run-length codes, so that memory stays bounded however many boxes an image has."""

from collections.abc import Sequence

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor


def encode_masks(masks: Tensor) -> list[dict]:
    """Encode masks.

    Args:
        masks: (N, H, W) bool.

    Returns:
        N COCO run-length codes, dicts with ``size`` [H, W] and ``counts`` (str), ready for JSON and CocoMetric.
    """
    # pycocotools wants (H, W, N) in Fortran order; torch transposes faster than NumPy copies
    columns = masks.to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    codes = coco_mask.encode(columns.transpose(2, 1, 0))
    return [{'size': [int(side) for side in code['size']], 'counts': code['counts'].decode()} for code in codes]


def decode_masks(codes: Sequence[dict], shape: tuple[int, int]) -> np.ndarray:
    """Decode run-length codes.

    Args:
        codes: as ``encode_masks`` returns them.
        shape: height and width, needed where there are no codes.

    Returns:
        (N, H, W) bool.
    """
    if not codes:
        return np.zeros((0, *shape), dtype=bool)
    return coco_mask.decode(list(codes)).transpose(2, 0, 1).astype(bool)
