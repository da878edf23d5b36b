"""Killed at any moment and resumed, a run ends with the same packed model, byte for byte."""

import signal
import subprocess

import pytest

from ptqsam.cli import main
from tests.tiny import tool_command

RECIPE = """
_base_: {base}
rules: [{{match: '*', quantizer: {{type: LSQ}}}}, {{match: '*.weight', quantizer: {{type: Uniform}}}}]
reconstruction: {{iters: 4, unit: block, max_boxes: 2, tokens_per_step: 64}}
"""
# part of the pipeline, not of the recipe, which the resumed run has to agree with
KILLER = """
import os
import signal
from pathlib import Path

import ptqsam.reconstruction.engine as engine
import ptqsam.solver.reconstruct as stage
from ptqsam.reconstruction.engine import Reconstructor

WHEN = os.environ['KILL']
commit, after_iteration, save_file = Reconstructor.commit, Reconstructor.after_iteration, engine.save_file
written = []


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after_commit(self, unit, outcome):
    commit(self, unit, outcome)
    if self.numbers[unit] == 0:
        kill()


def kill_in_iteration(self, unit, step, loss):
    after_iteration(self, unit, step, loss)
    if (self.numbers[unit], step) == (3, 3):
        kill()


def kill_while_writing(tensors, path, *args):
    written.append(path)
    save_file(tensors, path, *args)
    if len(written) == (4 if WHEN == 'commit' else 1):
        Path(path).write_bytes(Path(path).read_bytes()[:1000])
        kill()


if WHEN == 'after the first commit':
    Reconstructor.commit = kill_after_commit
elif WHEN == 'in an iteration':
    Reconstructor.after_iteration = kill_in_iteration
elif WHEN == 'commit':
    engine.save_file = kill_while_writing
else:
    stage.save_file = kill_while_writing
"""


@pytest.fixture(scope='module')
def recipe(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp('recipe') / 'recipe.yaml'
    path.write_text(RECIPE.format(base=tiny / 'recipe.yaml'))
    return path


@pytest.fixture(scope='module')
def uninterrupted(tiny, recipe, tmp_path_factory):
    """Work dir of a run that nothing happened to."""
    work_dir = tmp_path_factory.mktemp('whole')
    assert main([str(tiny / 'tiny.py'), str(recipe), '--work-dir', str(work_dir)]) == 0
    return work_dir


def packed(work_dir):
    return (work_dir / 'packed/model.safetensors').read_bytes()


@pytest.mark.parametrize(
    ('moment', 'committed'),
    [('after the first commit', 1), ('in an iteration', 3), ('commit', 3), ('calibrated', 0)],
)
def test_killed_and_resumed(moment, committed, tiny, recipe, uninterrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('KILL', moment)
    (tmp_path / 'killer.py').write_text(KILLER)
    imports = ['projects.instance_segment_anything', 'killer']
    (tmp_path / 'tiny.py').write_text(f"_base_ = '{tiny / 'tiny.py'}'\ncustom_imports = dict(imports={imports})\n")
    work_dir = tmp_path / 'w'
    command = tool_command(tmp_path / 'tiny.py', recipe, '--work-dir', work_dir)
    command['env']['PYTHONPATH'] += f':{tmp_path}'
    done = subprocess.run(**command, cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(list((work_dir / 'reconstruction').glob('0*.safetensors'))) == committed
    assert not (work_dir / 'packed').exists()
    assert main([str(tiny / 'tiny.py'), str(recipe), '--work-dir', str(work_dir), '--resume']) == 0
    assert packed(work_dir) == packed(uninterrupted)
    files = [path.name for path in sorted((uninterrupted / 'reconstruction').glob('0*.safetensors'))]
    for name in files:
        ours, theirs = (folder / 'reconstruction' / name for folder in (work_dir, uninterrupted))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert (work_dir / 'reconstruction.csv').read_text() == (uninterrupted / 'reconstruction.csv').read_text()
    if committed:
        assert 'search ranges' not in capsys.readouterr().err, 'it calibrated again'


@pytest.mark.parametrize('options', [['bits.act=7'], ['reconstruction.iters=5'], ['calibration.seed=3']])
def test_another_recipe_is_refused_in_one_line(options, tiny, recipe, uninterrupted, tmp_path, capsys):
    """Interrupted before packing: what is there is the calibrated model and some units."""
    work_dir = tmp_path / 'w'
    (work_dir / 'reconstruction').mkdir(parents=True)
    for name in ('calibrated.safetensors', '000.safetensors'):
        (work_dir / 'reconstruction' / name).write_bytes((uninterrupted / 'reconstruction' / name).read_bytes())
    command = [str(tiny / 'tiny.py'), str(recipe), '--work-dir', str(work_dir), '--quant-options', *options]
    assert main([*command, '--resume']) == 2
    error = capsys.readouterr().err.strip().split('\n')[-1]
    assert error.startswith('error: --resume: ') and 'differs from this run in recipe' in error
    assert '--work-dir' in error


def test_without_resume_nothing_old_is_used(tiny, recipe, uninterrupted, tmp_path):
    """Files of a recipe with more units lie in the way; another seed gives another result."""
    work_dir = tmp_path / 'w'
    folder = work_dir / 'reconstruction'
    folder.mkdir(parents=True)
    for path in (uninterrupted / 'reconstruction').iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / '099.safetensors').write_bytes(b'')
    command = [str(tiny / 'tiny.py'), str(recipe), '--work-dir', str(work_dir), '--seed', '3']
    assert main(command) == 0
    assert packed(work_dir) != packed(uninterrupted)
    assert not (folder / '099.safetensors').exists()
