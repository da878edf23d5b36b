"""Swin Transformer: mmdet's, and the names of the original in it."""

from collections.abc import Callable
from typing import Any

import torch
from mmdet.models import SwinTransformer
from mmdet.registry import MODELS
from torch import Tensor
from torch.overrides import TorchFunctionMode

from projects.detr_common import Rule


class _LinspaceOnCPU(TorchFunctionMode):
    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        device = {'device': 'cpu'} if function is torch.linspace else {}
        return function(*args, **(kwargs or {}), **device)


@MODELS.register_module()
class Swin(SwinTransformer):
    """mmdet's ``SwinTransformer``, which can also be built on the meta device: it reads rates out of a tensor."""

    def __init__(self, **kwargs: Any) -> None:
        with _LinspaceOnCPU():
            super().__init__(**kwargs)


def unfold_order(values: Tensor) -> Tensor:
    """Reorder what reads the four merged pixels of Swin's patch merging.

    The original concatenates the pixels' channels, pixels in the order (y, x) = 00, 10, 01, 11. mmdet merges by
    ``unfold``: of each channel the four pixels, in the order 00, 01, 10, 11.

    Args:
        values: (..., 4 C) weight of the reduction, or weight or bias of the norm before it.

    Returns:
        The same shape, in mmdet's order.
    """
    pixels = values.unflatten(-1, (4, -1))
    return pixels[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)


_BODY = r'^backbone\.0\.body\.'
_BLOCK = _BODY + r'layers\.(\d\.blocks\.\d+)'
SWIN = (
    Rule(_BODY + r'patch_embed\.proj\.', 'backbone.patch_embed.projection.'),
    Rule(_BODY + r'patch_embed\.norm\.', 'backbone.patch_embed.norm.'),
    Rule(_BLOCK + r'\.attn\.', r'backbone.stages.\1.attn.w_msa.'),
    Rule(_BLOCK + r'\.mlp\.fc1\.', r'backbone.stages.\1.ffn.layers.0.0.'),
    Rule(_BLOCK + r'\.mlp\.fc2\.', r'backbone.stages.\1.ffn.layers.1.'),
    Rule(_BLOCK + r'\.(norm[12])\.', r'backbone.stages.\1.\2.'),
    Rule(_BODY + r'layers\.(\d\.downsample\.(?:norm|reduction))\.', r'backbone.stages.\1.', unfold_order),
    Rule(_BODY + r'(norm[0-3])\.', r'backbone.\1.'),
)
