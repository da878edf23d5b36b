"""Which normalisation feeds which linear layer, and nothing else: what may be moved from the one into the other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ptqsam.modules.base import qualified_name


@dataclass(frozen=True)
class NormFeed:
    """A LayerNorm whose output is read by one linear layer only.

    Attributes:
        norm: attribute that holds it.
        layer: path of the linear layer, from the module that holds the norm.
        pads: whether an instance may put zeros between the two, which must then stay zeros; None: never.
    """

    norm: str
    layer: str
    pads: Callable[[Any], bool] | None = None


# by the class that holds the norm in a model with quant modules. Where TinyViT pads its windows, it pads before the
# norm; SAM's ViT pads after it, and its attention looks at the padding
_FEEDS: dict[str, tuple[NormFeed, ...]] = {
    'ptqsam.modules.tiny_vit_attention.QuantTinyViTAttention': (NormFeed('norm', 'qkv'),),
    'ptqsam.modules.mlp.QuantNormMlp': (NormFeed('norm', 'fc1'),),
    'segment_anything.modeling.image_encoder.Block': (
        NormFeed('norm1', 'attn.qkv', pads=lambda block: block.window_size > 0),
        NormFeed('norm2', 'mlp.lin1'),
    ),
}


def norm_feeds(module: nn.Module) -> tuple[NormFeed, ...]:
    """Norms of a module's class that feed one linear layer each."""
    return _FEEDS.get(qualified_name(module), ())
