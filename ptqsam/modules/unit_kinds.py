"""What reconstruction must know of modules: which are units, and how a part of their input is drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ptqsam.config import UnitLevel
from ptqsam.modules.base import QuantModule, qualified_name


@dataclass(frozen=True)
class UnitKind:
    """What reconstruction must know of a class of modules.

    Attributes:
        level: smallest unit level at which the module is reconstructed as a whole.
        positions: how a part of its input is drawn (`ptqsam.reconstruction.sampling`).
        channel_axis: axis of the channels in its output; None: 1 where its last operator is a convolution, else -1.
        ends_stage: whether a stage ends with this instance; None: instances do not form stages.
        followed_to: which output of the two-way transformer prompt-aware reconstruction looks at when this makes the
            output of a segment: `QUERIES` or `IMAGE_TOKENS`; None: its own output is all there is to look at.
        skipped: layer skipping leaves it out: it adds to what it gets, and keeps the shape.
    """

    level: UnitLevel
    positions: str = 'batch'
    channel_axis: int | None = None
    ends_stage: Callable[[Any], bool] | None = None
    followed_to: int | None = None
    skipped: bool = False


# outputs of the two-way transformer
QUERIES, IMAGE_TOKENS = 0, 1
_SAM = 'segment_anything.modeling'
_TIMM = 'timm.models.tiny_vit'
TWO_WAY_TRANSFORMER = f'{_SAM}.transformer.TwoWayTransformer'
# float classes that are reconstructed as a whole, beside the quant modules (which say so by `positions`)
_KINDS: dict[str, UnitKind] = {
    f'{_SAM}.image_encoder.PatchEmbed': UnitKind('block', channel_axis=-1),
    f'{_SAM}.image_encoder.Block': UnitKind(
        'block', ends_stage=lambda block: block.window_size == 0, followed_to=IMAGE_TOKENS, skipped=True
    ),
    f'{_SAM}.transformer.TwoWayAttentionBlock': UnitKind('block', followed_to=QUERIES),
    f'{_TIMM}.PatchEmbed': UnitKind('block'),
    f'{_TIMM}.ConvNorm': UnitKind('module', 'crop'),
    f'{_TIMM}.MBConv': UnitKind('module', 'crop'),
    f'{_TIMM}.PatchMerging': UnitKind('module', 'crop'),
    f'{_TIMM}.TinyVitBlock': UnitKind('block', channel_axis=-1, followed_to=IMAGE_TOKENS, skipped=True),
    f'{_TIMM}.ConvLayer': UnitKind('stage', 'crop', followed_to=IMAGE_TOKENS),
    f'{_TIMM}.TinyVitStage': UnitKind('stage', channel_axis=1, followed_to=IMAGE_TOKENS),
}


def unit_kind(module: nn.Module) -> UnitKind | None:
    """What is known of a module's class; None: it is no unit of level 'module' or higher."""
    if isinstance(module, QuantModule):
        return UnitKind('module', module.positions) if module.positions else None
    return _KINDS.get(qualified_name(module))
