"""What all tests share: the environment they run in, and the real weights and images where those exist."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiny import RECIPE, ROOT, write_pipeline

# set before torch is imported: tests are small, and `make test` runs one process of them per core
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')
# no test may depend on a network or wait for one, whatever the shell is set to
os.environ['WANDB_MODE'] = 'offline'
os.environ.setdefault('HF_HUB_OFFLINE', '1')

# the same examples in every run, and no limit on the time of one: a busy machine must not fail a test
settings.register_profile('ptqsam', deadline=None, derandomize=True, max_examples=50)
settings.load_profile('ptqsam')


def pytest_configure() -> None:
    # test modules import segment_anything and timm at their top; the processes that tests start get no such help
    from ptqsam.torchvision_compat import ensure_torchvision

    ensure_torchvision()


@pytest.fixture(scope='session')
def assets() -> Path:
    """Folder of real weights and images (``ckpt/``, ``data/``); the test is skipped where there is none."""
    folder = Path(os.environ.get('PTQSAM_ASSETS', ROOT.parent / 'shared' / 'assets'))
    if not (folder / 'ckpt').is_dir() or not (folder / 'data').is_dir():
        pytest.skip(f'no real weights and images in {folder}; PTQSAM_ASSETS names a folder with ckpt/ and data/')
    return folder


@pytest.fixture
def told() -> Iterator[list[str]]:
    """Warnings that a user sees on the console and in the log of a run, as they come."""
    from mmengine.logging import MMLogger

    lines: list[str] = []
    handler = logging.Handler('WARNING')
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = MMLogger.get_current_instance()
    logger.handlers.append(handler)
    yield lines
    logger.handlers.remove(handler)


@pytest.fixture(scope='session')
def scenes(tmp_path_factory) -> Path:
    """A small set of composed scenes: 4 for calibration, 2 for evaluation."""
    from projects.scenes import generate_scenes

    return generate_scenes(tmp_path_factory.mktemp('scenes') / 'scenes', num_train=4, num_val=2, progress=False)


@pytest.fixture(scope='session')
def tiny(tmp_path_factory, scenes) -> Path:
    """Folder with `tiny.py` (pipeline), `tiny.pth` (its weights) and `recipe.yaml`; see tests/tiny.py."""
    import torch
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    folder = tmp_path_factory.mktemp('tiny')
    config = Config.fromfile(write_pipeline(folder, scenes))
    init_default_scope('mmdet')
    from mmdet.registry import MODELS

    torch.manual_seed(0)
    torch.save(MODELS.build(config.model.sam).state_dict(), folder / 'tiny.pth')
    write_pipeline(folder, scenes, folder / 'tiny.pth')
    (folder / 'recipe.yaml').write_text(RECIPE)
    return folder
