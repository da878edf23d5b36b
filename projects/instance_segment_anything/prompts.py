"""How boxes become prompts and masks become scored instances."""

from dataclasses import dataclass, fields

from mmengine.structures import InstanceData

from ptqsam.errors import ConfigError

from .checks import check_kind


@dataclass(frozen=True)
class PromptOptions:
    """The options of the field (``model.test_cfg``).

    Args:
        score_thr: boxes with a lower score are left out; 0.05 is usual for CNN detectors, 0 for DETR types.
        max_boxes: the best so many boxes of an image are used; of a detector, 300 are kept.
        use_sam_iou: an instance's score is the detector's score times SAM's predicted IoU, else the detector's.
        multimask: SAM predicts three masks per box and the one of the best predicted IoU is taken, else one.
        cascade: number of extra passes that feed the mask back as a prompt beside the box.
        chunk_size: boxes that are decoded together; bounds the memory, does not change the masks.
    """

    score_thr: float = 0.05
    max_boxes: int = 100
    use_sam_iou: bool = True
    multimask: bool = False
    cascade: int = 0
    chunk_size: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            check_kind(f'model.test_cfg.{field.name}', getattr(self, field.name), field.default)
        for name, least in (('max_boxes', 1), ('cascade', 0), ('chunk_size', 1)):
            if getattr(self, name) < least:
                raise ConfigError(f'model.test_cfg.{name}={getattr(self, name)} is too small; use {least} or more')

    def select(self, proposals: InstanceData) -> InstanceData:
        """Best boxes first (equal scores keep their order), at most ``max_boxes``, none below ``score_thr``.

        Args:
            proposals: with ``scores`` (N,).

        Returns:
            The selected ones.
        """
        order = proposals.scores.argsort(descending=True, stable=True)[: self.max_boxes]
        proposals = proposals[order]
        return proposals[proposals.scores >= self.score_thr]
