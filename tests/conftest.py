"""What all tests share: the environment they run in, and the real weights and images where those exist."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# set before torch is imported: tests are small, and more threads than this only get in each other's way
os.environ.setdefault('OMP_NUM_THREADS', '2')
os.environ.setdefault('MPLBACKEND', 'Agg')
# no test may depend on a network or wait for one
os.environ.setdefault('WANDB_MODE', 'offline')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

# the same examples in every run, and no limit on the time of one: a busy machine must not fail a test
settings.register_profile('ptqsam', deadline=None, derandomize=True, max_examples=50)
settings.load_profile('ptqsam')


@pytest.fixture(scope='session')
def assets() -> Path:
    """Folder of real weights and images (``ckpt/``, ``data/``); the test is skipped where there is none."""
    folder = Path(os.environ.get('PTQSAM_ASSETS', ROOT.parent / 'shared' / 'assets'))
    if not (folder / 'ckpt').is_dir() or not (folder / 'data').is_dir():
        pytest.skip(f'no real weights and images in {folder}; PTQSAM_ASSETS names a folder with ckpt/ and data/')
    return folder
