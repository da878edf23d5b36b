"""tools/conformance.py: the entries of CI for real, and what becomes of numbers that moved, of bad files and of failures."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ptqsam.conformance import load_suite, select
from ptqsam.conformance.cli import main
from ptqsam.conformance.metrics import SKIPPED, Expectation, compare
from ptqsam.conformance.runs import STATE
from tests.tiny import ROOT

TOOLS = ROOT / 'tools'
SUITE = ROOT / 'exp' / 'conformance.yaml'
# what the entries of this file expect is written by the tests
FILE = f"""
setups:
  tiny: {{config: {ROOT}/configs/demo/demo_tiny.py, scenes: {{train: 2, val: 1}}}}

entries:
  # comments stay
  first:
    setup: tiny
    recipe: {ROOT}/exp/mse/w4a4.yaml
    quant_options: {{calibration.num_images: 2}}
    tags: [quick]
    expect:
      # as well as this one
      sqnr_db.act: {{value: SQNR, tolerance: 0.01}}  # and this
      quantized.weight.4: {{value: 41}}
      compat: {{value: []}}
  # the second
  loading:
    setup: tiny
    load: first
    expect: {{size_mb.packed: {{value: 1, tolerance: 1}}}}
"""


def check(*words, file, work_dir, capsys):
    """Exit code, stdout, stderr and the last line's object of a check in this process."""
    code = main(TOOLS, [*words, '--file', str(file), '--work-dir', str(work_dir)])
    out, err = capsys.readouterr()
    return code, out, err, json.loads(out.splitlines()[-1]) if out and code in (0, 1) else None


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """A file whose expectations hold, and the work dir of the check that says so."""
    folder = tmp_path_factory.mktemp('conformance')
    file, work_dir = folder / 'suite.yaml', folder / 'runs'
    file.write_text(FILE.replace('SQNR', '0'))
    main(TOOLS, ['all', '--file', str(file), '--work-dir', str(work_dir)])
    return file, work_dir


def test_the_entries_of_ci_are_as_expected(tmp_path):
    """With real weights and images where there are any; the small model of random weights everywhere."""
    assets = Path(os.environ.get('PTQSAM_ASSETS', ROOT.parent / 'shared' / 'assets'))
    folders = dict(PTQSAM_DATA=str(assets / 'data'), PTQSAM_CKPT=str(assets / 'ckpt'))
    checked = subprocess.run(
        [sys.executable, str(TOOLS / 'conformance.py'), 'ci', '--work-dir', str(tmp_path)],
        **dict(cwd=ROOT, env={**os.environ, **folders, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True),
        timeout=1200,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    entries = json.loads(checked.stdout.splitlines()[-1])['entries']
    expected = select(load_suite(SUITE), ['ci'])
    assert list(entries) == list(expected)
    for name, entry in entries.items():
        real = expected[name].scenes is None
        assert entry['verdict'] == (SKIPPED if real and not assets.is_dir() else 'ok')
        assert set(entry['metrics']) == (set() if entry['verdict'] == SKIPPED else set(expected[name].expect))
