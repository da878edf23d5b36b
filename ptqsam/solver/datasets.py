"""Datasets of a run: what is in them, and which of their images calibrate."""

from collections.abc import Sequence
from logging import Logger
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data import SequentialSampler

from ptqsam.config import QuantConfig
from ptqsam.fileio import fingerprint, sha256_file
from ptqsam.places import without_places
from ptqsam.solver.calibrate import draw_images


def build_dataset(config: dict[str, Any]) -> Any:
    """Build a dataset and read its annotations."""
    dataset = DATASETS.build(config)
    dataset.full_init()
    return dataset


def image_names(dataset: Any) -> list[str]:
    """File names of a dataset's images, in order; COCO's are unique over its splits."""
    return [Path(dataset.get_data_info(index)['img_path']).name for index in range(len(dataset))]


def data_identity(dataset: Any, config: Any) -> str:
    """Name of the images that a dataset holds, their annotations, and how they are prepared."""
    files = [Path(dataset.get_data_info(index)['img_path']) for index in range(len(dataset))]
    sizes = [[file.name, file.stat().st_size if file.is_file() else None] for file in files]
    return fingerprint([sizes, sha256_file(dataset.ann_file), without_places(config)])


def build_calib_loader(
    config: dict[str, Any], recipe: QuantConfig, evaluated: Sequence[str], num_workers: int, logger: Logger
) -> Any:
    """Loader of the drawn calibration images, one per batch.

    Args:
        config: of the dataset that they are drawn from.
        recipe: how many, and the seed.
        evaluated: file names of the evaluated split; these are left out.
        num_workers: processes that load images.
        logger: is told of images that are left out.
    """
    calibration = recipe.calibration
    dataset = build_dataset(config)
    names = image_names(dataset)
    if is_main_process() and (shared := set(names) & set(evaluated)):
        logger.warning(f'calibration: {len(shared)} of {len(names)} images are evaluated as well; they are left out')
    drawn = draw_images(names, evaluated, calibration.num_images, calibration.seed, recipe.compat.first_images)
    dataset.get_subset_(drawn)
    loader = dict(
        dataset=dataset,
        batch_size=1,
        num_workers=num_workers,
        # all of them in every process; who runs which is decided later
        sampler=SequentialSampler(dataset),
        collate_fn=dict(type='pseudo_collate'),
    )
    return Runner.build_dataloader(loader)
