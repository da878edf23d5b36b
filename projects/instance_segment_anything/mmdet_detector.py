"""Boxes from any mmdet detector, built when the first box is asked for."""

import importlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData

from ptqsam.errors import ConfigError
from ptqsam.fileio import sha256_file
from ptqsam.weights import load_weights

from .checks import build_checked
from .detector_weights import load_detector_weights


class MMDetDetector:
    """An mmdet detector with its own checkpoint and its own image pipeline.

    Args:
        config: a config by name ('mmdet::yolox/yolox_l_8xb8-300e_coco.py', 'projects.hdetr::hdetr_r50_coco.py') or by
            path, or a model config dict.
        checkpoint: weights in mmdet's names, or those that the detector's ``from_official`` knows.
        pipeline: test pipeline of the detector; the one of the config when that is a name or path.
    """

    from_annotations = False

    def __init__(
        self,
        config: str | Mapping[str, Any],
        checkpoint: str | None = None,
        pipeline: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        if not isinstance(config, str | Mapping):
            raise ConfigError(f'model.detector={config!r} must be the name or path of an mmdet config, or a dict')
        if not isinstance(checkpoint, str | None):
            raise ConfigError(f'model.detector_checkpoint={checkpoint!r} must be a path')
        self.config = config
        self.checkpoint = checkpoint
        self.pipeline = pipeline
        self._model: torch.nn.Module | None = None
        self._transforms: Compose | None = None
        self._device: torch.device | None = None
        self._hashes: dict[tuple[str, int, int], str] = {}

    def identity(self) -> dict[str, Any]:
        """What the boxes depend on: the resolved model config and pipeline, and the sha256 of the weights."""
        model, pipeline = self.resolve()
        return {'model': model, 'pipeline': pipeline, 'weights': self._hash()}

    def num_classes(self) -> int | None:
        """How many classes the detector tells apart; None where its config does not say.

        Raises:
            ConfigError: see ``resolve``.
        """
        model, _ = self.resolve()
        for part in (model, model.get('roi_head')):
            head = part.get('bbox_head') if isinstance(part, Mapping) else None
            # a cascade has one head per stage; the last one decides
            head = head[-1] if isinstance(head, list | tuple) and head else head
            if isinstance(head, Mapping) and isinstance(head.get('num_classes'), int):
                return head['num_classes']
        return None

    def resolve(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Read the model config and the pipeline, whichever way they were given.

        Returns:
            Model config and pipeline as plain dicts. The pipeline loads images with our checks and no annotations.

        Raises:
            ConfigError: a config that cannot be read, or that lacks a model or a pipeline.
        """
        pipeline = self.pipeline
        if isinstance(self.config, str):
            config = _read_config(self.config)
            model = config.get('model')
            pipeline = pipeline or config.get('test_dataloader', {}).get('dataset', {}).get('pipeline')
        else:
            model = self.config
        if not model or not pipeline:
            missing = 'model' if not model else 'test pipeline (give model.detector_pipeline)'
            raise ConfigError(f'model.detector: has no {missing}; name an mmdet config or write it out')
        steps = [step for step in _plain(pipeline) if not step.get('type', '').endswith('Annotations')]
        for step in steps:
            if step.get('type') == 'LoadImageFromFile':
                step['type'] = 'LoadImage'
        return _plain(model), steps

    @torch.no_grad()
    def detect(self, data_sample: DetDataSample, device: torch.device) -> InstanceData:
        """Detect objects in one image.

        Args:
            data_sample: metainfo ``img_path`` and ``img_id`` are read.
            device: where the detector runs.

        Returns:
            ``bboxes`` (N, 4) xyxy in pixels of the original image, ``scores`` (N,), ``labels`` (N,).

        Raises:
            AssetError: missing or wrong checkpoint, missing or undecodable image.
        """
        if self._model is None:
            self._build()
        if self._device != device:
            self._model.to(device)
            self._device = device
        with DefaultScope.overwrite_default_scope('mmdet'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # mmdet 3.3 makes calls that torch has deprecated since
            data = self._transforms(dict(img_path=data_sample.img_path, img_id=data_sample.img_id))
            found = self._model.test_step(pseudo_collate([data]))[0].pred_instances
        return InstanceData(bboxes=found.bboxes, scores=found.scores, labels=found.labels)

    def release(self) -> None:
        """Give the detector's memory back; the next ``detect`` builds it again."""
        self._model = self._transforms = self._device = None

    def _build(self) -> None:
        config, pipeline = self.resolve()
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = build_checked('model.detector', MODELS, ConfigDict(config))
            steps = [build_checked('model.detector_pipeline', TRANSFORMS, step) for step in pipeline]
        load_detector_weights(model, self._checkpoint())
        self._model, self._transforms = model.eval(), Compose(steps)

    def _hash(self) -> str:
        """Sha256 of the checkpoint; read again only when the file has changed, for it may have gigabytes."""
        path = self._checkpoint()
        status = Path(path).stat()
        key = (path, status.st_size, status.st_mtime_ns)
        if key not in self._hashes:
            self._hashes = {key: sha256_file(path)}
        return self._hashes[key]

    def _checkpoint(self) -> str:
        if self.checkpoint is None:
            raise ConfigError('model.detector_checkpoint is missing: the detector needs its weights')
        if not Path(self.checkpoint).is_file():
            load_weights(self.checkpoint)  # has the message for a missing file
        return self.checkpoint


def _read_config(name: str) -> Config:
    """Read a config file, or 'PACKAGE::PATH' of those in a package: OpenMMLab's folder .mim/configs, else configs."""
    try:
        package, _, path = name.rpartition('::')
        if package:
            # importing it also registers the classes that its configs name
            root = Path(importlib.import_module(package).__file__).parent
            places = [root / folder / path for folder in ('.mim/configs', 'configs')]
            path = str(next((place for place in places if place.is_file()), places[-1]))
        return Config.fromfile(path)
    except (OSError, KeyError, ValueError, TypeError, ImportError, SyntaxError) as error:
        reason = ' '.join(str(error).split())
        raise ConfigError(
            f"model.detector='{name}': cannot read this config ({reason}); "
            "write 'mmdet::FOLDER/NAME.py', 'projects.NAME::FILE.py' or the path of a config file"
        ) from None


def _plain(value: Any) -> Any:
    """ConfigDicts as dicts, all the way down."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value
