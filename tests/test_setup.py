"""The package description: what setup.py declares, and that the pinned versions lie inside it."""

import re
import runpy
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ptqsam
from tests.tiny import ROOT


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to ``setup()``."""
    arguments: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, 'setup', lambda **given: arguments.update(given))
    runpy.run_path('setup.py')
    return arguments


def test_description(declared: dict[str, Any]) -> None:
    assert declared['version'] == ptqsam.__version__
    assert declared['entry_points'] == {
        'console_scripts': ['ptqsam-test = ptqsam.cli:main', 'ptqsam-sweep = ptqsam.sweep.cli:main']
    }
    packages = set(declared['packages'])
    assert {'ptqsam', 'ptqsam.quantizers', 'projects.instance_segment_anything', 'projects.detr_common'} <= packages
    # configs of detectors are found beside the code
    assert {f'projects.{name}.configs' for name in ('hdetr', 'focalnet_dino', 'detr_common')} <= packages
    assert {name.split('.')[0] for name in packages} == {'ptqsam', 'projects'}


def test_pins_lie_inside_the_declared_ranges(declared: dict[str, Any]) -> None:
    pins = {
        canonicalize_name(name): version
        for name, version in re.findall(r'^([\w-]+)==(\S+)$', (ROOT / 'requirements.txt').read_text(), re.MULTILINE)
    }
    for requirement in map(Requirement, [*declared['install_requires'], *declared['extras_require']['dev']]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)
    # mmdet refuses every other series, and setup.py cannot say so: see there
    assert pins['mmcv'].startswith('2.1.')
