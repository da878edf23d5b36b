"""COCO annotations with checks and without chatter: mmdet's dataset, and the index that metrics use."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.registry import DATASETS

from ptqsam.coco_files import fetch_advice
from ptqsam.errors import AssetError

from .checks import checked_arguments


class CheckedCOCO(COCO):
    """pycocotools' index of an annotation file, with clear errors and nothing printed.

    Args:
        path: instances file in COCO format.

    Raises:
        AssetError: missing, empty, damaged, or without images or annotations.
    """

    def __init__(self, path: str | Path) -> None:
        check_annotation_file(path)
        self.path = path
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                super().__init__(str(path))
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise _damaged(path, error) from None
        for part in ('images', 'annotations', 'categories'):
            if not self.dataset.get(part):
                raise AssetError(f"{path}: annotation file has no '{part}'; an instances file in COCO format is needed")

    def get_cat_ids(
        self, cat_names: Sequence[str] = (), sup_names: Sequence[str] = (), cat_ids: Sequence[int] = ()
    ) -> list[int]:
        """Ids of categories; those of names in the order of the names, for a position in this list is a label.

        The list of mmdet and pycocotools follows the file, and leaves out what the file does not know.

        Args:
            cat_names: names of categories, each known to the file; none: all categories, in the order of the file.
            sup_names: as in pycocotools, where there are no names.
            cat_ids: as in pycocotools, where there are no names.

        Returns:
            One id per name.

        Raises:
            AssetError: a name that the file does not have, or has twice.
        """
        if not cat_names:
            return super().get_cat_ids([], list(sup_names), list(cat_ids))
        ids: dict[str, list[int]] = {}
        for category in self.dataset['categories']:
            ids.setdefault(category['name'], []).append(category['id'])
        if missing := [name for name in cat_names if name not in ids]:
            lacks = f"has no category '{missing[0]}', which is one of the classes"
            if len(missing) == len(cat_names):
                lacks = f'knows none of the classes {", ".join(cat_names[:3])}, ...'
            raise AssetError(
                f'{self.path}: annotation file {lacks}; set dataset.metainfo.classes to the categories of the file, '
                "or add what is missing to its 'categories'"
            )
        if twice := [name for name in cat_names if len(ids[name]) > 1]:
            raise AssetError(f"{self.path}: annotation file has several categories '{twice[0]}'; give them own names")
        return [ids[name][0] for name in cat_names]


@DATASETS.register_module()
@checked_arguments('dataset')
class CheckedCocoDataset(CocoDataset):
    """mmdet's ``CocoDataset``, which says what is wrong with its files instead of failing later.

    Args:
        kwargs: those of ``CocoDataset``.
    """

    COCOAPI = CheckedCOCO

    def load_data_list(self) -> list[dict]:
        """Load the annotation file.

        Raises:
            AssetError: see ``CheckedCOCO``; or an object lacks its box or mask, or shares its id with another.
        """
        try:
            data = super().load_data_list()
        except (ValueError, KeyError, TypeError, IndexError, AssertionError) as error:
            raise _damaged(self.ann_file, error) from None
        for image in data:
            if any('mask' not in instance for instance in image['instances']):
                raise AssetError(f"{self.ann_file}: objects of image {image['img_id']} have no 'segmentation'")
        return data


def _damaged(path: str | Path, error: Exception) -> AssetError:
    """What to say when something in an annotation file is not as it should be."""
    kind = 'damaged JSON' if isinstance(error, json.JSONDecodeError) else 'not in COCO format'
    reason = ' '.join(str(error).split())
    if isinstance(error, KeyError):
        reason = f'something lacks {reason}'
    reason = reason or type(error).__name__
    return AssetError(f'{path}: annotation file is {kind} ({reason}); get or make it again')


def check_annotation_file(path: str | Path) -> None:
    """Refuse an annotation file that is missing or empty."""
    path = Path(path)
    if not path.is_file():
        raise AssetError(f'{path}: no such annotation file; {fetch_advice(path) or _MAKE_IT}{_ELSEWHERE}')
    if not path.stat().st_size:
        raise AssetError(f'{path}: annotation file is empty; get or make it again')


_MAKE_IT = 'make the embedded data with tools/make_scenes.py'
_ELSEWHERE = ', or set PTQSAM_DATA to the folder that holds coco/ or scenes/'
