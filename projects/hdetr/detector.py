"""Deformable DETR with mixed query selection, and the official names of H-Deformable-DETR."""

from collections.abc import Mapping

from mmdet.models import DeformableDETR, DeformableDETRHead
from mmdet.registry import MODELS
from torch import Tensor, nn

from projects.detr_common import OfficialHead, Rule, input_projections, to_mmdet, two_stage_transformer

from .swin import SWIN

RESNET = Rule(r'^backbone\.0\.body\.((?:conv1|bn1|layer[1-4])\.)', r'backbone.\1')


@MODELS.register_module()
class HDETRHead(OfficialHead, DeformableDETRHead):
    """Deformable DETR's head with 91 encoder classes; boxes are not clipped."""


@MODELS.register_module()
class HDeformableDETR(DeformableDETR):
    """H-Deformable-DETR (Jia et al., CVPR 2023) as it is at inference: the one-to-one branch alone.

    Against mmdet's two-stage ``DeformableDETR`` one thing differs, mixed query selection: the content of query i is a
    learned vector, only its position comes from the i-th best proposal. The one-to-many branch and looking forward
    twice concern the training.

    Args: those of ``DeformableDETR``, with ``as_two_stage=True`` and ``with_box_refine=True``.
    """

    def _init_layers(self) -> None:
        super()._init_layers()
        self.query_embedding = nn.Embedding(self.num_queries, self.embed_dims)

    def pre_decoder(self, memory: Tensor, memory_mask: Tensor | None, spatial_shapes: Tensor) -> tuple[dict, dict]:
        """As in mmdet, with the learned query content in place of the one that mmdet makes of the proposals."""
        decoder_inputs, head_inputs = super().pre_decoder(memory, memory_mask, spatial_shapes)
        decoder_inputs['query'] = self.query_embedding.weight.expand(len(memory), -1, -1)
        return decoder_inputs, head_inputs

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of an official checkpoint and leave out what inference does not use.

        Args:
            state: tensors by official name (the entry ``model`` of the file), ResNet or Swin; own names may be there.

        Returns:
            Tensors by own name. Unknown names stay.
        """
        rules = [
            RESNET,
            *SWIN,
            *input_projections(levels=3),
            *two_stage_transformer(),
            Rule(r'^transformer\.pos_trans\.', 'pos_trans_fc.'),
            Rule(r'^transformer\.pos_trans_norm\.', 'pos_trans_norm.'),
            Rule(r'^class_embed\.6\.', 'bbox_head.cls_branches.6.'),
            # the rows behind them are queries of the one-to-many branch
            Rule(r'^query_embed\.weight$', 'query_embedding.weight', lambda rows: rows[: self.num_queries]),
        ]
        return to_mmdet(state, rules)
