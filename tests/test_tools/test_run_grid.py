"""exp/run_grid.sh: which commands it runs, what it does when they fail or are interrupted, and the real thing once."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptqsam.cli import parse_args
from ptqsam.report.grid import DETECTORS, grid_table, read_cells
from tests.tiny import ROOT, accept_interrupts

SCRIPT = ROOT / 'exp' / 'run_grid.sh'
SETTINGS = (
    'DETECTORS',
    'SAMS',
    'RECIPES',
    'BITS',
    'VARIANT',
    'WORK_DIR',
    'CONFIGS',
    'EXP',
    'NPROC',
    'LAUNCH',
    'PYTHON',
)
# in the place of the interpreter: does what the name of the recipe says
FAKE = """#!/usr/bin/env bash
if [[ $1 == -m ]]; then printf 'table of %s\n- Failed: as in the end\n' "$3"; exit; fi
recipe=$3 work_dir=$5
echo "$@" >> calls.txt
[[ -f $work_dir/fp.json ]] && echo 'float metrics are there'
case $recipe in
    *bad*) echo 'error: no such thing' >&2; exit 3 ;;
    *crash*) printf 'Traceback\\n  File\\nKeyError: 7\\n\\n' >&2; exit 1 ;;
    *empty*) echo nothing; exit 0 ;;
    *slow*) touch started; until [[ -f go ]]; do sleep 0.02; done ;;
esac
echo {} > "$work_dir/fp.json"
echo {} > "$work_dir/result.json"
"""


@pytest.fixture
def grid(tmp_path):
    """A folder with two pipelines, recipes whose names say what happens, and the interpreter that makes it happen."""
    for detector in ('one', 'two'):
        for variant in ('', '_cascade'):
            path = tmp_path / f'configs/{detector}/{detector}_sam-vit-b{variant}.py'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    for recipe in ('good', 'fine', 'bad', 'crash', 'empty', 'slow'):
        (tmp_path / 'exp' / recipe).mkdir(parents=True)
        for bits in ('w4a4', 'w6a6'):
            (tmp_path / 'exp' / recipe / f'{bits}.yaml').touch()
    (tmp_path / 'fake').write_text(FAKE)
    (tmp_path / 'fake').chmod(0o755)
    return tmp_path


def command(folder, *args, **environment):
    """Arguments of `subprocess`: the script in a folder of `grid`."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    own = dict(CONFIGS='configs', EXP='exp', PYTHON='./fake', DETECTORS='one', SAMS='sam-vit-b')
    own |= dict(RECIPES='good', BITS='w4a4')
    return dict(args=['bash', str(SCRIPT), *args], env=clean | own | environment, cwd=folder, text=True)


def run(folder, *args, **environment):
    return subprocess.run(**command(folder, *args, **environment), capture_output=True, timeout=120)


def calls(folder):
    """The pipeline and recipe of each run so far."""
    path = folder / 'calls.txt'
    return [' '.join(Path(word).stem for word in line.split()[1:3]) for line in path.read_text().splitlines()]


def wait_for(path, process):
    limit = time.monotonic() + 100
    while not path.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    assert path.exists()


def test_the_default_is_the_grid_of_the_papers():
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        ['bash', SCRIPT, '--dry-run', '--', '--limit', '5', '--quant-options', 'rules.0.quantizer={"type": "LSQ"}'],
        **dict(cwd=ROOT, env=clean, text=True, capture_output=True, timeout=60),
    )
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and done.stderr == ''
    pipelines = {Path(line[2]).stem for line in lines}
    assert pipelines == {f'{detector}_sam-vit-{size}' for detector in DETECTORS for size in 'blh'}
    assert len(lines) == 4 * 3 * 4 * 3 and len({line[line.index('--work-dir') + 1] for line in lines}) == len(lines)
    for line in lines:
        assert line[1] == 'tools/test_quant.py'
        args = parse_args(line[2:])
        assert (ROOT / args.model_config).is_file() and (ROOT / args.quant_config).is_file()
        assert (args.eval_fp, args.resume, args.limit, args.launcher) == (True, True, 5, 'none')
        recipe = Path(args.quant_config)
        assert args.work_dir == Path(
            'work_dirs/grid', Path(args.model_config).stem, f'{recipe.parent.name}_{recipe.stem}'
        )


def test_arguments_come_before_the_environment(grid):
    done = run(grid, '--dry-run', '--detectors', 'two', '--variant', 'cascade', '--work-dir', 'a b', NPROC='2')
    (line,) = done.stdout.splitlines()
    python, *launch = shlex.split(line)[:5]
    assert (python, *launch) == ('./fake', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
    args = parse_args(shlex.split(line)[6:])
    assert args.model_config == 'configs/two/two_sam-vit-b_cascade.py' and args.quant_config == 'exp/good/w4a4.yaml'
    assert args.work_dir == Path('a b/two_sam-vit-b_cascade/good_w4a4') and args.launcher == 'pytorch'
    slurm = run(grid, '--dry-run', '--', '--launcher', 'slurm', LAUNCH='srun -n 4').stdout
    assert slurm.startswith('srun -n 4 ./fake ') and slurm.endswith(' --launcher slurm\n')
    assert not (grid / 'calls.txt').exists() and not (grid / 'work_dirs').exists()


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--detector', 'one'], "unknown option '--detector'"),
        (['--bits'], '--bits needs a value'),
        (['--detectors', 'one three'], "no detector 'three' in configs; there: one two"),
        (['--detectors', 'T-w_o'], "no detector 'T-w_o' in configs (did you mean 'two'?); there: one two"),
        (['--sams', 'vit_b'], "no SAM for one 'vit_b' in configs (did you mean 'sam-vit-b'?); there: sam-vit-b"),
        (['--variant', 'other'], "no variant of one_sam-vit-b 'other' in configs; there: cascade"),
        (['--recipes', 'good FIN'], "no folder of recipes 'FIN' in exp (did you mean 'fine'?); there: bad crash empty"),
        (['--bits', 'w3a3'], "no recipe 'w3a3' in exp/good; there: w4a4 w6a6"),
        (['--sams', ' '], 'nothing to do'),
        (['--', '--limit', '2', '--work-dir', 'x'], '--work-dir after --: this script sets it'),
    ],
)
def test_bad_usage_is_one_line_before_anything_runs(args, message, grid):
    done = run(grid, *args)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith('error: ') and message in line
    assert not (grid / 'calls.txt').exists()


def test_bad_number_of_processes(grid):
    assert "NPROC='two' must be a number" in run(grid, NPROC='two').stderr
    done = run(grid, '--dry-run', '--', '--launcher', 'slurm', NPROC='4', LAUNCH='srun -n 4')
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr == 'error: NPROC=4 starts torchrun; leave it out, or --launcher after --\n'


def test_a_cell_that_fails_stops_no_other(grid):
    done = run(grid, RECIPES='bad crash empty good', DETECTORS='one two', WORK_DIR='w')
    assert done.returncode == 1 and 'table of w' in done.stdout
    expected = {
        'bad': 'error: no such thing',
        'crash': 'exit code 1: KeyError: 7',
        'empty': 'exit code 0: nothing',
    }
    lines = [f'{d}_sam-vit-b/{r}_w4a4: {text}' for d in ('one', 'two') for r, text in expected.items()]
    assert done.stderr.splitlines() == ['cells that failed: 6', *lines]
    # once when it happens, once in the end
    assert done.stdout.count('error: no such thing') == 2 and '- Failed: ' not in done.stdout
    assert '- Failed: ' in run(grid, '--print', WORK_DIR='w').stdout
    for line in lines:
        cell, _, text = line.partition(': ')
        assert (grid / 'w' / cell / 'error.txt').read_text() == f'{text}\n'
    assert calls(grid)[-1] == 'two_sam-vit-b w4a4'

    # what is finished stays, what failed is tried again
    (grid / 'fake').write_text(FAKE.replace('*bad*', '*none*'))
    before = len(calls(grid))
    again = run(grid, RECIPES='bad good', DETECTORS='one', WORK_DIR='w')
    assert again.returncode == 0 and again.stdout.count('done already') == 1 and again.stderr == ''
    assert len(calls(grid)) == before + 1 and not (grid / 'w/one_sam-vit-b/bad_w4a4/error.txt').exists()
    listed = run(grid, '--dry-run', RECIPES='good crash', WORK_DIR='w').stdout.splitlines()
    assert [line.startswith('# done: ') for line in listed] == [True, False]


TORCHRUN = """W1120 19:13:20.5 18186 torch/distributed/elastic/multiprocessing/api.py:1010] closing signal SIGTERM
E1120 19:13:20.6 18186 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 4) local_rank: 1
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  error_file: <N/A>
============================================================
"""
BAR = '\rcalibrate:   0%|          | 0/8 [00:00<?, ? image/s]\rcalibrate:  50%|#####     | 4/8 [00:01<00:01]'


@pytest.mark.parametrize(
    ('said', 'reason'),
    [
        (f'{BAR}error: no such thing\n', 'error: no such thing'),
        (f'{BAR} error: /x: error: no such thing\n{BAR}', 'error: /x: error: no such thing'),
        (f'error: first\r{BAR}\nusage\ntest_quant.py: error: last\n{BAR}\n', 'error: last'),
        (f'quantization error: 0.5\n{BAR}\nKeyError: 7\n\n', 'exit code 1: KeyError: 7'),
        ('', 'exit code 1'),
    ],
)
def test_the_reason_is_found_between_bars_and_the_report_of_torchrun(said, reason, grid):
    (grid / 'said').write_text(said + TORCHRUN)
    (grid / 'fake').write_text('#!/bin/sh\ncat said >&2\nexit 1\n')
    done = run(grid)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f'one_sam-vit-b/good_w4a4: {reason}'
    assert (grid / 'work_dirs/grid/one_sam-vit-b/good_w4a4/error.txt').read_text() == f'{reason}\n'


def test_the_float_model_is_evaluated_once_per_pipeline(grid):
    done = run(grid, RECIPES='good fine', DETECTORS='one two')
    assert done.returncode == 0
    there = [part.splitlines()[0].split()[1] for part in done.stdout.split('== ')[1:] if 'float metrics' in part]
    assert there == ['one_sam-vit-b/fine_w4a4', 'two_sam-vit-b/fine_w4a4']


def test_a_result_with_other_options_is_no_result(grid):
    assert run(grid, '--', '--limit', '2').returncode == 0
    assert run(grid, '--', '--limit', '2').returncode == 0
    done = run(grid)
    message = 'error: made with other options (--limit 2); choose another --work-dir'
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f'one_sam-vit-b/good_w4a4: {message}'
    assert done.stdout.count(message) == 1
    assert len(calls(grid)) == 1
    # a run that failed because of an option may be tried with another one
    assert run(grid, '--', '--seed', '1', RECIPES='bad').returncode == 1
    assert run(grid, RECIPES='bad').returncode == 1
    assert (grid / 'work_dirs/grid/one_sam-vit-b/bad_w4a4/options.txt').read_text() == '\n'


def test_two_scripts_do_not_work_on_one_cell(grid):
    """The lock is that of the tool, too: it outlives the script that started it."""
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen(**command(grid, RECIPES='slow'), **quiet) as first:
        wait_for(grid / 'started', first)
        other = run(grid, RECIPES='slow good')
        assert other.returncode == 0 and other.stdout.count('another run works on it') == 1
        assert 'cells left to another run: 1' in other.stdout
        first.kill()
        first.wait()
        assert 'another run works on it' in run(grid, RECIPES='slow').stdout
        (grid / 'go').touch()
    result = grid / 'work_dirs/grid/one_sam-vit-b/slow_w4a4/result.json'
    limit = time.monotonic() + 100
    while 'done already' not in (out := run(grid, RECIPES='slow').stdout) and time.monotonic() < limit:
        time.sleep(0.05)
    assert result.exists() and 'done already' in out and len(calls(grid)) == 2


def test_interrupt_stops_the_grid(grid):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=accept_interrupts, start_new_session=True)
    with subprocess.Popen(**command(grid, RECIPES='slow good'), **pipes) as process:
        wait_for(grid / 'started', process)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and 'start the same command again' in stderr
    assert len(calls(grid)) == 1 and not list(grid.rglob('error.txt'))


def test_the_script_is_clean():
    if shutil.which('shellcheck') is None:
        pytest.skip('shellcheck is not installed')
    done = subprocess.run(['shellcheck', SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_killed_and_started_again_on_the_tiny_pipeline(tiny, tmp_path):
    """The real tool is killed when its model is packed; the same command goes on there, and the table shows it."""
    (tmp_path / 'configs/tiny').mkdir(parents=True)
    (tmp_path / 'configs/tiny/tiny_sam-vit-b.py').write_text(f"_base_ = '{tiny / 'tiny.py'}'\n")
    (tmp_path / 'exp/good').mkdir(parents=True)
    (tmp_path / 'exp/good/w4a8.yaml').write_text(f'_base_: {tiny / "recipe.yaml"}\n')
    # the table is made here, without waiting for one more interpreter
    (tmp_path / 'python').write_text(f'#!/bin/sh\ntest "$1" = -m || exec {sys.executable} "$@"\n')
    (tmp_path / 'python').chmod(0o755)
    own = dict(DETECTORS='tiny', BITS='w4a8', PYTHON='./python', OMP_NUM_THREADS='1')
    options = command(tmp_path, **own, PYTHONPATH=str(ROOT))
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    cell = tmp_path / 'work_dirs/grid/tiny_sam-vit-b/good_w4a8'
    with subprocess.Popen(**options, **quiet) as process:
        wait_for(cell / 'packed/manifest.json', process)
        os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(['flock', cell / '.lock', 'true'], check=True, timeout=100)  # until the tool is gone, too
    assert not (cell / 'result.json').exists()

    done = subprocess.run(**options, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((cell / 'result.json').read_text())
    assert 'calibrate' not in result['seconds'] and result['metrics']['fp'] is not None
    lost = 100 * (result['metrics']['quant']['segm_mAP'] - result['metrics']['fp']['segm_mAP'])
    head, _, row, *_ = grid_table(read_cells(tmp_path / 'work_dirs/grid')).splitlines()
    assert head == '| detector | recipe | SAM-B FP | W4A8 |'
    assert row.startswith('| tiny | good | ') and row.endswith(f' ({lost:+.1f}) |')
