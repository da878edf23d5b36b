"""What tests of reports share."""

import os
from pathlib import Path

import pytest

from tests.test_report.wandb_files import run_tool


@pytest.fixture
def wandb(monkeypatch):
    """The module, with none of the caller's settings; what a test leaves running is ended."""
    module = pytest.importorskip('wandb')
    for name in [name for name in os.environ if name.startswith('WANDB_')]:
        monkeypatch.delenv(name)
    yield module
    module.teardown()


@pytest.fixture(scope='session')
def reported(tiny, tmp_path_factory) -> Path:
    """Work dir of a finished run with everything that is reported to wandb."""
    pytest.importorskip('wandb')
    work_dir = tmp_path_factory.mktemp('wandb') / 'work'
    assert run_tool(tiny, work_dir, '--show-dir', work_dir / 'masks') == 0
    return work_dir
