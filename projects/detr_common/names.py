"""From the names of official Deformable DETR and DINO checkpoints to those of mmdet 3.3."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

# row j of an official class head is COCO's category id j; these ids have no category
_UNUSED_IDS = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = tuple(j for j in range(91) if j not in _UNUSED_IDS)
DECODER_LAYERS = 6


class Rule(NamedTuple):
    """What becomes of the tensors whose name matches.

    Attributes:
        pattern: regular expression, searched in the name.
        target: replaces the match, may refer to its groups; None drops the tensor.
        change: what becomes of the values.
    """

    pattern: str
    target: str | None
    change: Callable[[Tensor], Tensor] | None = None


def to_mmdet(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Rename the tensors of an official checkpoint.

    Args:
        state: tensors by name.
        rules: the first that matches a name decides; a name that none matches stays, with its values.

    Returns:
        Tensors by new name; unchanged ones are the same objects.
    """
    result = {}
    for name, tensor in state.items():
        rule = next((rule for rule in rules if re.search(rule.pattern, name)), None)
        if rule is None:
            result[name] = tensor
        elif rule.target is not None:
            changed = tensor if rule.change is None else rule.change(tensor)
            result[re.sub(rule.pattern, rule.target, name)] = changed
    return result


def used_classes(rows: Tensor) -> Tensor:
    """Keep the rows of COCO's 80 categories.

    Args:
        rows: (91, ...) weight or bias of a class head; with another number of rows it is no head for COCO.

    Returns:
        (80, ...) in the order of the category ids, which is that of mmdet's labels; other tensors as they are.
    """
    return rows[list(COCO_IDS)] if len(rows) == 91 else rows


def input_projections(levels: int) -> list[Rule]:
    """Names of the projections of feature maps.

    Args:
        levels: number of feature maps that come from the backbone; the next projection makes one more level.
    """
    return [
        Rule(rf'^input_proj\.{levels}\.0\.', 'neck.extra_convs.0.conv.'),
        Rule(rf'^input_proj\.{levels}\.1\.', 'neck.extra_convs.0.gn.'),
        Rule(r'^input_proj\.(\d)\.0\.', r'neck.convs.\1.conv.'),
        Rule(r'^input_proj\.(\d)\.1\.', r'neck.convs.\1.gn.'),
    ]


def two_stage_transformer() -> list[Rule]:
    """Names of transformer and heads, as far as Deformable DETR and DINO have the same."""
    layer = r'^transformer\.((?:encoder|decoder)\.layers\.\d+)'
    encoder_layer = r'^transformer\.(encoder\.layers\.\d+)'
    decoder_layer = r'^transformer\.(decoder\.layers\.\d+)'
    return [
        # of the encoder layer's attention only the prefix goes; the decoder's lies one module deeper
        Rule(decoder_layer + r'\.self_attn\.', r'\1.self_attn.attn.'),
        Rule(layer + r'\.(self_attn|cross_attn)\.', r'\1.\2.'),
        Rule(encoder_layer + r'\.norm1\.', r'\1.norms.0.'),
        Rule(encoder_layer + r'\.norm2\.', r'\1.norms.1.'),
        # mmdet counts the norms in the order of use, and self-attention comes first
        Rule(decoder_layer + r'\.norm2\.', r'\1.norms.0.'),
        Rule(decoder_layer + r'\.norm1\.', r'\1.norms.1.'),
        Rule(decoder_layer + r'\.norm3\.', r'\1.norms.2.'),
        Rule(layer + r'\.linear1\.', r'\1.ffn.layers.0.0.'),
        Rule(layer + r'\.linear2\.', r'\1.ffn.layers.1.'),
        Rule(r'^transformer\.level_embed$', 'level_embed'),
        Rule(r'^transformer\.enc_output\.', 'memory_trans_fc.'),
        Rule(r'^transformer\.enc_output_norm\.', 'memory_trans_norm.'),
        # the decoder keeps a second copy of the heads
        Rule(r'^transformer\.decoder\.(class|bbox)_embed\.', None),
        Rule(rf'^class_embed\.([0-{DECODER_LAYERS - 1}])\.', r'bbox_head.cls_branches.\1.', used_classes),
        Rule(r'^bbox_embed\.(\d)\.layers\.0\.', r'bbox_head.reg_branches.\1.0.'),
        Rule(r'^bbox_embed\.(\d)\.layers\.1\.', r'bbox_head.reg_branches.\1.2.'),
        Rule(r'^bbox_embed\.(\d)\.layers\.2\.', r'bbox_head.reg_branches.\1.4.'),
    ]
