"""A detector proposes boxes, SAM turns them into masks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from ptqsam.errors import ConfigError, GateError
from ptqsam.fileio import fingerprint, sha256_file
from ptqsam.shared_work import SharedWork

from .box_cache import AttachBoxes, CachedBoxes, cached_boxes, check_limits, known_boxes
from .checks import build_checked, checked_arguments, reject_unknown
from .embedding_cache import EmbeddingCache
from .masks import encode_masks
from .mmdet_detector import MMDetDetector
from .oracle import OracleDetector
from .prompts import PromptOptions
from .sam import SegmentAnything

# upscaled logits of one image that exist at a time: 2^25 pixels are 128 MiB, all masks of a chunk for COCO's sizes
_MAX_PIXELS = 2**25


@MODELS.register_module()
@checked_arguments('model')
class DetectorPromptedSAM(BaseDetector):
    """Instance segmentation by SAM with the boxes of a detector as prompts.

    The detector is a plain object, not a submodule: it is built when the first box is asked for (never, when the boxes
    come from a cache), and neither ``state_dict()`` nor quantization nor ``deepcopy`` ever sees it.

    Args:
        detector: name or path of an mmdet config, an mmdet model config, or ``dict(type='OracleDetector')``.
        sam: config of ``SegmentAnything``.
        detector_checkpoint: weights of the detector.
        detector_pipeline: the detector's own test pipeline; that of its config when ``detector`` is a name or path.
        test_cfg: fields of ``PromptOptions``.
        data_preprocessor: mmdet's ``DetDataPreprocessor`` with SAM's mean and std, padding to SAM's input.
    """

    def __init__(
        self,
        detector: str | Mapping[str, Any],
        sam: Mapping[str, Any],
        detector_checkpoint: str | None = None,
        detector_pipeline: Sequence[Mapping[str, Any]] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
    ) -> None:
        # built here, because mmengine would look for mmdet's under its own names
        built = (
            None if data_preprocessor is None else build_checked('model.data_preprocessor', MODELS, data_preprocessor)
        )
        super().__init__(data_preprocessor=built)
        test_cfg = {} if test_cfg is None else test_cfg
        if not isinstance(test_cfg, Mapping):
            raise ConfigError(f'model.test_cfg={test_cfg!r} must be a dict')
        reject_unknown('model.test_cfg', test_cfg, [field.name for field in fields(PromptOptions)])
        self.options = PromptOptions(**test_cfg)
        self.sam: SegmentAnything = build_checked('model.sam', MODELS, sam)
        self.sam_config = {name: value for name, value in sam.items() if name != 'checkpoint'}
        self._embeddings: EmbeddingCache | None = None
        self.detector: OracleDetector | MMDetDetector
        if isinstance(detector, Mapping) and detector.get('type') == 'OracleDetector':
            self.detector = build_checked('model.detector', MODELS, detector)
        else:
            self.detector = MMDetDetector(detector, detector_checkpoint, detector_pipeline)

    def origin(self) -> dict[str, Any]:
        """What the masks depend on beside the images: SAM and its weights, the prompts. Compared on resume."""
        path = self.sam.checkpoint
        return dict(
            sam=fingerprint(self.sam_config),
            checkpoint=sha256_file(path) if path and Path(path).is_file() else None,
            prompts=fingerprint([self.detector.identity(), asdict(self.options)]),
        )

    def init_weights(self) -> None:
        """Load SAM's checkpoint. The detector loads its own when it is built."""
        self.sam.init_weights()

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.parameters()).device

    def encode(self, batch_inputs: Tensor) -> Tensor:
        """Embed preprocessed images (B, 3, S, S) as (B, C, S / 16, S / 16)."""
        return (self.sam if self._embeddings is None else self._embeddings).encode(batch_inputs)

    extract_feat = encode

    @contextmanager
    def embeddings_of_others(self, shared: SharedWork) -> Iterator[None]:
        """Take from other runs, meanwhile, the embeddings that they have; the encoder, in float, stays as it is."""
        self._embeddings = EmbeddingCache(self.sam, self.sam_config, shared)
        try:
            yield
        finally:
            self._embeddings = None

    def detect(self, data_sample: DetDataSample) -> InstanceData:
        """All boxes of one image: those that the data sample carries, else the detector's.

        Args:
            data_sample: ``proposals`` if there are any; else what the detector needs.

        Returns:
            ``bboxes`` (N, 4) xyxy in pixels of the original image, ``scores`` (N,), ``labels`` (N,).
        """
        if 'proposals' in data_sample:
            return data_sample.proposals
        return self.detector.detect(data_sample, self.device)

    def attach_boxes(self, dataset: Any, cache_dir: str | Path) -> None:
        """Let a dataset's data samples carry their prompt boxes, so that no later run of it needs the detector.

        Args:
            dataset: an mmdet ``CocoDataset`` whose pipeline ends with ``PackDetInputs``; gets one more step, which
                replaces that of an earlier call.
            cache_dir: folder for the boxes of a detector (see ``cached_boxes``); the oracle's need no file.

        Raises:
            AssetError, ConfigError: see ``cached_boxes``; or the options ask for boxes that the file does not keep.
        """
        if self.detector.from_annotations:
            source = self.detector
        else:
            check_limits(self.options)
            source = CachedBoxes(cached_boxes(self.detector, dataset, cache_dir, self.device))
        steps = [step for step in dataset.pipeline.transforms if not isinstance(step, AttachBoxes)]
        dataset.pipeline.transforms = [*steps, AttachBoxes(source, self.options)]

    def count_boxes(self, dataset: Any, cache_dir: str | Path) -> list[int] | None:
        """Number of prompt boxes of each image of a dataset, without running the detector.

        Args:
            dataset: an mmdet ``CocoDataset``, whole or a subset.
            cache_dir: folder for the boxes of a detector.

        Returns:
            One number per image, in order; None where the detector would have to run first.

        Raises:
            AssetError: the detector's weights are missing, or its boxes were tampered with.
            ConfigError: the detector's config is wrong, or the options ask for boxes that the file does not keep.
        """
        images = [dataset.get_data_info(index) for index in range(len(dataset))]
        if self.detector.from_annotations:
            counts = [sum(not item['ignore_flag'] for item in image['instances']) for image in images]
            return [min(count, self.options.max_boxes) for count in counts]
        check_limits(self.options)
        boxes = known_boxes(self.detector, dataset, cache_dir)
        if boxes is None:
            return None
        counts = [int((boxes[image['img_id']][1] >= self.options.score_thr).sum()) for image in images]
        return [min(count, self.options.max_boxes) for count in counts]

    @torch.no_grad()
    def predict(
        self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample], rescale: bool = True
    ) -> list[DetDataSample]:
        """Segment a batch of images.

        Args:
            batch_inputs: (B, 3, S, S) from the data preprocessor.
            batch_data_samples: B data samples with metainfo ``img_id``, ``img_path``, ``ori_shape``, ``img_shape``,
                ``scale_factor``, and optionally ``proposals``.
            rescale: part of mmdet's signature; masks and boxes are always those of the original image.

        Returns:
            The data samples with ``pred_instances`` as ``decode`` returns them.
        """
        return self.predict_from(self.encode(batch_inputs), batch_data_samples)

    @torch.no_grad()
    def predict_from(self, embeddings: Tensor, batch_data_samples: list[DetDataSample]) -> list[DetDataSample]:
        """``predict`` for embeddings (B, C, S / 16, S / 16) that are there already."""
        for embedding, data_sample in zip(embeddings, batch_data_samples, strict=True):
            proposals = self.options.select(self.detect(data_sample))
            data_sample.pred_instances = self.decode(embedding[None], proposals, data_sample.metainfo)
        return batch_data_samples

    @torch.no_grad()
    def sam_inputs(self, batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """What SAM is given for every image of a batch, without running it.

        Args:
            batch: as for ``test_step``.

        Returns:
            Image (1, 3, S, S) as ``encode`` takes it, and boxes (N, 4) as ``decode_logits`` takes them.
        """
        data = self.data_preprocessor(batch, False)
        return [
            (image[None], prompt_boxes(self.options.select(self.detect(sample)), sample.metainfo))
            for image, sample in zip(data['inputs'], data['data_samples'], strict=True)
        ]

    def decode(self, embedding: Tensor, proposals: InstanceData, metainfo: Mapping[str, Any]) -> InstanceData:
        """Segment the proposals of one image, chunk by chunk.

        Args:
            embedding: (1, C, S / 16, S / 16).
            proposals: ``bboxes`` (N, 4) xyxy in pixels of the original image, ``scores`` (N,), ``labels`` (N,).
            metainfo: ``ori_shape``, ``img_shape`` (height, width before padding), ``scale_factor`` (width, height).

        Returns:
            ``bboxes``, ``scores``, ``labels`` as given; ``mask_scores`` (N,), by which instances are ranked; ``masks``:
            N run-length codes of the original resolution (``decode_masks`` makes arrays of them).
        """
        prompts = prompt_boxes(proposals, metainfo)
        masks: list[dict] = []
        quality, finite = [], []
        for start in range(0, len(proposals), self.options.chunk_size):
            logits, iou = self.decode_logits(embedding, prompts[start : start + self.options.chunk_size])
            finite.append(torch.isfinite(logits).all() & torch.isfinite(iou).all())
            masks += self._binary_masks(logits, metainfo['img_shape'], metainfo['ori_shape'])
            quality.append(iou)
        if finite and not torch.stack(finite).all():
            raise GateError(
                f"{metainfo['img_path']}: SAM's masks or scores are NaN or infinite; check the checkpoint and the image"
            )
        scores = proposals.scores
        if self.options.use_sam_iou and quality:
            scores = scores * torch.cat(quality)
        return InstanceData(
            bboxes=proposals.bboxes, scores=proposals.scores, labels=proposals.labels, mask_scores=scores, masks=masks
        )

    def decode_logits(self, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Masks for one chunk of boxes, with the choice among masks and the extra passes that the options ask for.

        Args:
            embedding: (1, C, S / 16, S / 16).
            boxes: (N, 4) xyxy in pixels of the resized image.

        Returns:
            Logits (N, S / 4, S / 4) and predicted IoU (N,).
        """
        logits, iou = None, None
        for _ in range(1 + self.options.cascade):
            logits, iou = self.sam.decode(embedding, boxes, logits, self.options.multimask)
            best = iou.argmax(dim=1, keepdim=True)
            iou = iou.gather(1, best)
            logits = logits.take_along_dim(best[..., None, None], dim=1)
        return logits[:, 0], iou[:, 0]

    def _binary_masks(self, logits: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]) -> list[dict]:
        pixels = max(original_size[0] * original_size[1], self.sam.image_size**2)
        masks: list[dict] = []
        for part in logits[:, None].split(max(1, _MAX_PIXELS // pixels)):
            part = self.sam.postprocess_masks(part, tuple(input_size), tuple(original_size))
            masks += encode_masks(part[:, 0] > self.sam.mask_threshold)
        return masks

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample]) -> dict:
        """There is no training loss."""
        raise NotImplementedError('DetectorPromptedSAM has no loss: it is quantized after training, never trained')

    def _forward(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample] | None = None) -> Tensor:
        raise NotImplementedError("DetectorPromptedSAM has no mode 'tensor': use mode='predict', encode() or decode()")


def prompt_boxes(proposals: InstanceData, metainfo: Mapping[str, Any]) -> Tensor:
    """Boxes (N, 4) of proposals, in pixels of the resized image."""
    return proposals.bboxes * proposals.bboxes.new_tensor(metainfo['scale_factor']).repeat(2)
