"""Embeddings of images by the float encoder, kept for other runs: other detectors and prompts, other decoders."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ptqsam import __version__
from ptqsam.fileio import fingerprint
from ptqsam.shared_work import SharedWork, hash_tensors, load_tensors, numerics, save_tensors

from .sam import SegmentAnything


class EmbeddingCache:
    """Encodes images that no run has encoded before.

    An embedding belongs to the pixels that the encoder is given, so to the image with all of its preparation, and to
    the weights of the encoder as they are now.

    Args:
        sam: with an encoder in float.
        sam_config: settings of it.
        shared: where the embeddings are.
    """

    def __init__(self, sam: SegmentAnything, sam_config: dict[str, Any], shared: SharedWork) -> None:
        self.sam = sam
        self.shared = shared
        weights = hash_tensors(sam.image_encoder.state_dict())
        self.made_with = dict(ptqsam=__version__, sam=sam_config, weights=weights, **numerics())

    def encode(self, images: Tensor) -> Tensor:
        """As ``SegmentAnything.encode``; of several images at once none is kept."""
        if len(images) != 1:
            return self.sam.encode(images)
        name = fingerprint([self.made_with, hash_tensors(dict(images=images))])
        embedding = self.shared.compute_once(
            'embeddings', f'{name}.safetensors', lambda: self.sam.encode(images), _load, _save
        )
        return embedding.to(images.device)


def _save(path: Path, embedding: Tensor) -> None:
    save_tensors(path, (dict(embedding=embedding), None))


def _load(path: Path) -> Tensor:
    return load_tensors(path)[0]['embedding']
