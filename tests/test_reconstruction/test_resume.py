"""Killed at any moment and resumed, a run ends with the same packed model, byte for byte."""

import json
import signal
import subprocess
import sys

import pytest
from safetensors import safe_open

from ptqsam.cli import main
from tests.tiny import tool_command

RECIPE = """
_base_: {base}
rules: [{{match: '*', quantizer: {{type: LSQ}}}}, {{match: '*.weight', quantizer: {{type: Uniform}}}}]
reconstruction: {{iters: 4, unit: block, max_boxes: 2, tokens_per_step: 64}}
"""
# moment -> units that are finished when the process dies; one after the other, each run resumes what the last one left
MOMENTS = {'when calibrated': 0, 'after the first commit': 1, 'in an iteration': 3, 'in a commit': 3}
# one process that imports everything once, with a whole run; the others are forks of it
RUNS = """
import json
import os
import signal
import sys
from pathlib import Path

from ptqsam.torchvision_compat import ensure_torchvision

ensure_torchvision()
import ptqsam.reconstruction.engine as engine
from ptqsam.cli import main
from ptqsam.reconstruction.engine import Reconstructor
from ptqsam.solver.reconstruct import ReconstructionStage


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def plant(moment):
    commit, after_iteration, save_file = Reconstructor.commit, Reconstructor.after_iteration, engine.save_file

    def kill_after_commit(self, unit, outcome):
        commit(self, unit, outcome)
        if self.numbers[unit] == 0:
            kill()

    def kill_in_iteration(self, unit, step, loss):
        after_iteration(self, unit, step, loss)
        if (self.numbers[unit], step) == (3, 3):
            kill()

    def kill_in_commit(tensors, path, facts):
        save_file(tensors, path, facts)
        if Path(path).name.startswith('.003'):
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            kill()

    if moment == 'after the first commit':
        Reconstructor.commit = kill_after_commit
    elif moment == 'in an iteration':
        Reconstructor.after_iteration = kill_in_iteration
    elif moment == 'in a commit':
        engine.save_file = kill_in_commit
    elif moment == 'when calibrated':
        ReconstructionStage.run = lambda *args: kill()


def run(moment, *options):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    log = os.open(f'{moment}.log', os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    plant(moment)
    code = main([*sys.argv[1:3], '--work-dir', 'killed', *options])
    sys.stderr.flush()
    os._exit(code)


assert main([*sys.argv[1:3], '--work-dir', 'whole']) == 0
statuses = {}
for moment in [*sys.argv[3:], 'never']:
    status = run(moment, *(['--resume'] if statuses else []))
    files = sorted(path.name for path in Path('killed').rglob('*.safetensors'))
    statuses[moment] = [status, [name for name in files if not name.startswith('.')]]
print(json.dumps(statuses))
"""


@pytest.fixture(scope='module')
def recipe(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp('recipe') / 'recipe.yaml'
    path.write_text(RECIPE.format(base=tiny / 'recipe.yaml'))
    return path


@pytest.fixture(scope='module')
def runs(tiny, recipe, tmp_path_factory):
    """Folder with the work dirs `whole` and `killed`; for each moment, and "never", how the run ended, what it left."""
    folder = tmp_path_factory.mktemp('runs')
    command = tool_command()
    command['args'] = [sys.executable, '-c', RUNS, str(tiny / 'tiny.py'), str(recipe), *MOMENTS]
    done = subprocess.run(**command, cwd=folder, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads(done.stdout.strip().split('\n')[-1])


def content(path):
    """Tensors and facts of a file; their order in it is random."""
    with safe_open(path, 'np') as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize('moment', MOMENTS)
def test_killed(moment, runs):
    folder, statuses = runs
    status, files = statuses[moment]
    log = (folder / f'{moment}.log').read_text()
    assert status == signal.SIGKILL, log[-2000:]
    assert files == [*(f'{number:03d}.safetensors' for number in range(MOMENTS[moment])), 'calibrated.safetensors']
    assert ('search ranges' in log) == (moment == 'when calibrated'), 'only the first run calibrates'


def test_resumed_after_all_kills(runs):
    folder, statuses = runs
    log = (folder / 'never.log').read_text()
    assert statuses['never'][0] == 0, log[-2000:]
    assert 'search ranges' not in log, 'it calibrated again'
    whole, again = folder / 'whole', folder / 'killed'
    names = {path.name for path in (whole / 'reconstruction').iterdir()}
    assert names == {path.name for path in (again / 'reconstruction').iterdir()}, 'files of a killed run are left'
    for name in names:
        assert content(again / 'reconstruction' / name) == content(whole / 'reconstruction' / name), name
    assert (again / 'packed/model.safetensors').read_bytes() == (whole / 'packed/model.safetensors').read_bytes()
    for name in ('reconstruction.csv', 'summary.csv'):
        assert (again / name).read_text() == (whole / name).read_text()


def test_another_recipe_is_refused_in_one_line(tiny, recipe, runs, tmp_path, capsys):
    """Interrupted before packing: what is there is the calibrated model and a unit."""
    folder = tmp_path / 'w/reconstruction'
    folder.mkdir(parents=True)
    for name in ('calibrated.safetensors', '000.safetensors'):
        (folder / name).write_bytes((runs[0] / 'whole/reconstruction' / name).read_bytes())
    option = ['--quant-options', 'reconstruction.iters=5']
    command = [str(tiny / 'tiny.py'), str(recipe), '--work-dir', str(folder.parent), *option]
    assert main([*command, '--resume']) == 2
    error = capsys.readouterr().err.strip().split('\n')[-1]
    assert error.startswith('error: --resume: ') and 'differs from this run in recipe' in error
    assert '--work-dir' in error


def test_without_resume_nothing_old_is_used(tiny, recipe, runs, tmp_path):
    """Finished units lie in the way, and those of a run with more units."""
    folder = tmp_path / 'w/reconstruction'
    folder.mkdir(parents=True)
    for path in (runs[0] / 'whole/reconstruction').iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / '099.safetensors').write_bytes(b'')
    assert main([str(tiny / 'tiny.py'), str(recipe), '--work-dir', str(folder.parent), '--seed', '3']) == 0
    assert not (folder / '099.safetensors').exists()
    ours, theirs = (work_dir / 'packed/model.safetensors' for work_dir in (folder.parent, runs[0] / 'whole'))
    assert ours.read_bytes() != theirs.read_bytes()
