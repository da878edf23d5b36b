"""DINO as it was published, with its official names."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.models import DINO, DINOHead
from mmdet.models.layers import inverse_sigmoid
from mmdet.registry import MODELS
from torch import Tensor

from projects.detr_common import OfficialHead, Rule, input_projections, to_mmdet, two_stage_transformer

from .backbone import FOCALNET

# smallest reference and largest, from 1, whose logit is exact; mmdet has it in the decoder, but 1e-5 in its head
_EPS = 1e-3


@MODELS.register_module()
class OfficialDINOHead(OfficialHead, DINOHead):
    """DINO's head with 91 encoder classes and the original's inverse sigmoid; boxes are not clipped."""

    def forward(self, hidden_states: Tensor, references: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Classes and boxes of all decoder layers.

        Args:
            hidden_states: (layers, batch, queries, width), normalised.
            references: boxes before each layer, (batch, queries, 4) cxcywh, sigmoid.

        Returns:
            Logits (layers, batch, queries, classes) and boxes (layers, batch, queries, 4) cxcywh, sigmoid.
        """
        layers = list(zip(hidden_states, references, self.cls_branches, self.reg_branches, strict=False))
        logits = [classify(state) for state, _, classify, _ in layers]
        boxes = [
            (regress(state) + inverse_sigmoid(reference, _EPS)).sigmoid() for state, reference, _, regress in layers
        ]
        return torch.stack(logits), torch.stack(boxes)


@MODELS.register_module()
class FocalNetDINO(DINO):
    """DINO (Zhang et al., ICLR 2023) at inference, for official checkpoints with a FocalNet.

    Args: those of ``DINO`` but ``dn_cfg``: denoising is a matter of training.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, dn_cfg=dict(group_cfg=dict(num_dn_queries=100)), **kwargs)
        self.dn_query_generator = None  # mmdet insists on building it; its table would lack in every checkpoint

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of an official checkpoint and leave out what inference does not use.

        Args:
            state: tensors by official name (the entry ``model`` of the file); own names may be there.

        Returns:
            Tensors by own name. Unknown names stay.
        """
        rules = [
            *FOCALNET,
            *input_projections(levels=4),
            *two_stage_transformer(),
            Rule(r'^transformer\.decoder\.(norm|ref_point_head)\.', r'decoder.\1.'),
            Rule(r'^transformer\.tgt_embed\.weight$', 'query_embedding.weight'),
            Rule(r'^transformer\.enc_out_class_embed\.', 'bbox_head.cls_branches.6.'),
            Rule(r'^transformer\.enc_out_bbox_embed\.layers\.0\.', 'bbox_head.reg_branches.6.0.'),
            Rule(r'^transformer\.enc_out_bbox_embed\.layers\.1\.', 'bbox_head.reg_branches.6.2.'),
            Rule(r'^transformer\.enc_out_bbox_embed\.layers\.2\.', 'bbox_head.reg_branches.6.4.'),
            Rule(r'^label_enc\.weight$', None),  # labels of denoising
        ]
        return to_mmdet(state, rules)
