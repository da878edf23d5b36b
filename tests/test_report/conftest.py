"""What tests of reports share."""

import os

import pytest


@pytest.fixture
def wandb(monkeypatch):
    """The module, with none of the caller's settings; what a test leaves running is ended."""
    module = pytest.importorskip('wandb')
    for name in [name for name in os.environ if name.startswith('WANDB_')]:
        monkeypatch.delenv(name)
    yield module
    module.teardown()
