"""COCO annotations with checks and without chatter: mmdet's dataset, and the index that metrics use."""

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.registry import DATASETS

from ptqsam.errors import AssetError


class CheckedCOCO(COCO):
    """pycocotools' index of an annotation file, with clear errors and nothing printed.

    Args:
        path: instances file in COCO format.

    Raises:
        AssetError: missing, empty, damaged, or without images or annotations.
    """

    def __init__(self, path: str | Path) -> None:
        check_annotation_file(path)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                super().__init__(str(path))
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            kind = 'damaged JSON' if isinstance(error, json.JSONDecodeError) else 'not in COCO format'
            reason = ' '.join(str(error).split()) or type(error).__name__
            raise AssetError(f'{path}: annotation file is {kind} ({reason}); get or make it again') from None
        for part in ('images', 'annotations', 'categories'):
            if not self.dataset.get(part):
                raise AssetError(f"{path}: annotation file has no '{part}'; an instances file in COCO format is needed")


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """mmdet's ``CocoDataset``, which says what is wrong with its files instead of failing later.

    Args:
        kwargs: those of ``CocoDataset``.
    """

    COCOAPI = CheckedCOCO

    def load_data_list(self) -> list[dict]:
        """Load the annotation file.

        Raises:
            AssetError: see ``CheckedCOCO``; or none of the classes occurs; or an object has no mask.
        """
        data = super().load_data_list()
        if not self.cat_ids:
            raise AssetError(
                f'{self.ann_file}: knows none of the classes {", ".join(self.metainfo["classes"][:3])}, ...; '
                'set dataset.metainfo.classes to the categories of the file'
            )
        for image in data:
            if any('mask' not in instance for instance in image['instances']):
                raise AssetError(f"{self.ann_file}: objects of image {image['img_id']} have no 'segmentation'")
        return data


def check_dataset(dataset: Mapping[str, Any]) -> None:
    """Look for a dataset's files before anything slow begins.

    Args:
        dataset: config of a COCO-format dataset: ``data_root``, ``ann_file``, ``data_prefix.img``.

    Raises:
        AssetError: the annotation file is missing or empty, or the image folder is missing.
    """
    root = Path(dataset.get('data_root') or '')
    check_annotation_file(root / dataset['ann_file'])
    images = root / dataset.get('data_prefix', {}).get('img', '')
    if not images.is_dir():
        raise AssetError(f'{images}: no such folder of images; {_ADVICE}')


def check_annotation_file(path: str | Path) -> None:
    """Refuse an annotation file that is missing or empty."""
    path = Path(path)
    if not path.is_file():
        raise AssetError(f'{path}: no such annotation file; {_ADVICE}')
    if not path.stat().st_size:
        raise AssetError(f'{path}: annotation file is empty; get or make it again')


_ADVICE = 'set PTQSAM_DATA to the folder that holds coco/, or make the embedded data with tools/make_scenes.py'
