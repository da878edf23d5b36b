"""Two real processes: the same result as one, and no process that waits for ever when another one fails."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from ptqsam.distributed import own_block
from ptqsam.errors import ConfigError
from ptqsam.launch import together
from tests.processes import finish_processes, start_processes
from tests.tiny import RECIPE, ROOT, run_tool, write_pipeline

# several recipes by one pair of processes: to start them takes longer than to run them
DRIVER = """
import sys
from ptqsam import cli
from ptqsam.launch import together

folder, launcher, *recipes = sys.argv[1:]
with together(launcher):
    for recipe in recipes:
        options = ['calibration.num_images=3', 'calibration.max_boxes=2']
        options += ['reconstruction.iters=2'] if recipe == 'ahcq_sam' else []
        command = ['tiny.py', f'{sys.path[1]}/exp/{recipe}/w4a4.yaml', '--work-dir', f'{folder}/{recipe}', '--eval-fp']
        cli.run(cli.parse_args([*command, '--quant-options', *options]))
"""
RECIPES = ('mse', 'repq_vit', 'saq_sam_s', 'ptq4sam_s', 'ahcq_sam')
# sums of floating-point numbers are added up in another order: averaged ranges; energies of channels, error Grams
BOUNDS = dict(ptq4sam_s=1e-6, ahcq_sam=1e-4)


@pytest.fixture(scope='module')
def both(tiny, tmp_path_factory):
    """Folder with results of one process and of two."""
    folder = tmp_path_factory.mktemp('both')
    (folder / 'drive.py').write_text(DRIVER)
    for name, count, launcher in (('one', 1, 'none'), ('two', 2, 'pytorch')):
        started = start_processes(count, folder / name, launcher, *RECIPES, cwd=tiny, program=folder / 'drive.py')
        for code, _, err in finish_processes(started, 600):
            assert code == 0, err
    return folder


@pytest.mark.parametrize('recipe', RECIPES)
def test_two_processes_quantize_and_evaluate_as_one(both, recipe):
    one, two = (load_file(both / name / recipe / 'packed/model.safetensors') for name in ('one', 'two'))
    assert one.keys() == two.keys()
    differing = {name for name in one if not torch.equal(one[name], two[name])}
    assert not differing or recipe in BOUNDS
    for name in differing:
        torch.testing.assert_close(one[name].float(), two[name].float(), rtol=BOUNDS[recipe], atol=1e-7)
    results = [json.loads((both / name / recipe / 'result.json').read_text()) for name in ('one', 'two')]
    assert [result['processes'] for result in results] == [1, 2]
    metrics = [result['metrics'] for result in results]
    assert metrics[0]['fp'] == metrics[1]['fp']
    if not differing:
        assert metrics[0] == metrics[1]


def test_only_the_main_process_talks(tiny, tmp_path):
    command = ('tiny.py', 'recipe.yaml', '--work-dir', tmp_path / 'run', '--launcher', 'pytorch')
    (first, second) = finish_processes(start_processes(2, *command, cwd=tiny))
    assert (first[0], second[0]) == (0, 0)
    assert json.loads(first[1].splitlines()[-1])['processes'] == 2
    assert second[1] == ''
    assert 'image/s' not in second[2]


def break_pipeline(folder, scenes, image: int):
    """A pipeline of which the calibration misses an image."""
    annotations = json.loads((scenes / 'annotations/instances_train.json').read_text())
    annotations['images'][image]['file_name'] = 'nowhere.png'
    copy = folder / 'data'
    (copy / 'annotations').mkdir(parents=True)
    for part in ('train', 'val'):
        (copy / part).symlink_to(scenes / part)
    (copy / 'annotations/instances_train.json').write_text(json.dumps(annotations))
    (copy / 'annotations/instances_val.json').symlink_to(scenes / 'annotations/instances_val.json')
    (folder / 'recipe.yaml').write_text(RECIPE.replace('num_images: 2', 'num_images: 4'))
    return write_pipeline(folder, copy)


def test_a_process_that_fails_stops_the_other_with_its_words(scenes, tmp_path):
    # only the second process loads the last image: the first one waits for its statistics
    config = break_pipeline(tmp_path, scenes, 3)
    command = (config, 'recipe.yaml', '--work-dir', 'run', '--launcher', 'pytorch')
    first, second = finish_processes(start_processes(2, *command, cwd=tmp_path), 120)
    assert (first[0], second[0]) == (3, 3)
    said = second[2].splitlines()[-1]
    assert said.startswith('error: ')
    assert 'nowhere.png' in said
    assert f'stopped, because process 1 failed: {said.removeprefix("error: ")}\n' in first[2]
    assert 'Traceback' not in first[2] + second[2]
    assert not (tmp_path / 'run/result.json').exists()


def test_the_main_process_is_killed(tiny, tmp_path):
    recipe = ROOT / 'exp/qdrop/w4a4.yaml'
    command = ('tiny.py', recipe, '--work-dir', tmp_path / 'run', '--launcher', 'pytorch')
    many = ('--quant-options', 'calibration.num_images=3', 'reconstruction.iters=100000')
    processes = start_processes(2, *command, *many, cwd=tiny)
    deadline = time.monotonic() + 120
    while not (tmp_path / 'run/reconstruction/calibrated.safetensors').exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    processes[0].send_signal(signal.SIGKILL)
    (killed, _, _), (code, _, err) = finish_processes(processes, 120)
    assert (killed, code, 'Traceback' in err) == (-signal.SIGKILL, 1, False)
    # the one that waits finds out by itself, or is told by its watch
    assert 'another process ended without a word' in err


def test_processes_with_different_weights_are_refused(tiny, scenes, tmp_path):
    state = torch.load(tiny / 'tiny.pth')
    for rank in range(2):
        torch.save({name: value + rank for name, value in state.items()}, tmp_path / f'of{rank}.pth')
    write_pipeline(tmp_path, scenes, tmp_path / 'of{{$RANK:0}}.pth')
    command = ('tiny.py', tiny / 'recipe.yaml', '--work-dir', 'run', '--launcher', 'pytorch')
    results = finish_processes(start_processes(2, *command, cwd=tmp_path), 120)
    assert [code for code, _, _ in results] == [2, 2]
    said = [line for _, _, err in results for line in err.splitlines() if 'differs from' in line]
    assert said == [
        'error: process 1 differs from the main one in model_config, checkpoint; give all the same files, options and '
        'environment (PTQSAM_CKPT, PTQSAM_DATA)'
    ]


KILLED = """
import os, signal, sys, time
from mmengine.dist import all_gather_object, is_main_process
from ptqsam.cli import exit_code_of
from ptqsam.launch import together

def run():
    with together('pytorch'):
        if not is_main_process():
            os.kill(os.getpid(), signal.SIGKILL)
        all_gather_object('waits for ever')
    return 0

sys.exit(exit_code_of(run, False, ''))
"""


def test_another_process_is_killed(tmp_path):
    (tmp_path / 'killed.py').write_text(KILLED)
    first, second = finish_processes(start_processes(2, cwd=tmp_path, program=tmp_path / 'killed.py'), 120)
    assert (first[0], second[0]) == (1, -signal.SIGKILL)
    assert 'error: another process ended without a word (killed, or out of memory?); look at its output' in first[2]
    assert 'Traceback' not in first[2]


def test_what_all_find_wrong_is_said_once(tiny):
    command = ('tiny.py', 'recipe.yaml', '--launcher', 'pytorch', '--quant-options', 'bits.wieght=4')
    results = finish_processes(start_processes(2, *command, cwd=tiny), 120)
    assert [code for code, _, _ in results] == [2, 2]
    assert ''.join(err for _, _, err in results).count("unknown key 'bits.wieght'") == 1


def test_torchrun_without_the_launcher_is_refused(monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ConfigError, match=r'torchrun started 2 processes.*add --launcher pytorch'), together('none'):
        pass


@pytest.mark.parametrize(('launcher', 'says'), [('pytorch', 'torchrun'), ('slurm', 'srun')])
def test_started_without_the_launcher(launcher, says, monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID'):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ConfigError, match=f'--launcher {launcher}: .* is not set; start with `{says}'),
        together(launcher),
    ):
        pass


def test_slurm_names_the_processes(tiny, tmp_path, monkeypatch):
    (tmp_path / 'scontrol').write_text('#!/bin/sh\necho 127.0.0.1\necho other\n')
    (tmp_path / 'scontrol').chmod(0o755)
    for name, value in dict(PROCID=0, NTASKS=1, LOCALID=0, JOB_ID=os.getpid(), JOB_NODELIST='node[1-2]').items():
        monkeypatch.setenv(f'SLURM_{name}', str(value))
    for name in ('MASTER_ADDR', 'MASTER_PORT', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    done = run_tool('tiny.py', 'recipe.yaml', '--work-dir', tmp_path / 'run', '--launcher', 'slurm', cwd=tiny)
    assert done.returncode == 0, done.stderr
    (tmp_path / 'scontrol').write_text('#!/bin/sh\nexit 1\n')
    with pytest.raises(ConfigError, match=r"scontrol names no host of SLURM_JOB_NODELIST='node\[1-2\]'"):
        with together('slurm'):
            pass


@pytest.mark.parametrize(('count', 'world_size'), [(5, 2), (1, 3), (0, 2), (7, 7), (10, 4)])
def test_blocks_are_all_in_order(count, world_size, monkeypatch):
    blocks = []
    for rank in range(world_size):
        monkeypatch.setattr('ptqsam.distributed.get_dist_info', lambda rank=rank: (rank, world_size))
        blocks.append(own_block(count))
    assert [position for block in blocks for position in block] == list(range(count))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    # the main process has something to see wherever there is anything
    assert len(blocks[0]) > 0 or count == 0
