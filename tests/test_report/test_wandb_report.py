"""Report to wandb: read back from the file that an offline run leaves."""

import io
import logging
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import HOOKS
from PIL import Image

from ptqsam.errors import AssetError, ConfigError
from ptqsam.reconstruction.optimise import Outcome
from ptqsam.registry import SOLVER_HOOKS, build_part
from ptqsam.report import WandbReport
from ptqsam.report.reconstruction import COLUMNS as OUTCOME_COLUMNS
from ptqsam.report.reconstruction import plot_outcomes, write_outcomes
from ptqsam.report.wandb_content import ITERATION, MAX_PICTURES, RANK, STAGES, summary_of
from tests.test_report.test_wandb_content import RESULT, ROWS, SUMMARY
from tests.test_report.wandb_files import children, points, read_run, table
from tests.tiny import ROOT

RECIPE = dict(algorithm='mse', bits=dict(weight=4, act=8), rules=[dict(match='*', bits=4)])


@pytest.fixture
def runner(tmp_path) -> SimpleNamespace:
    """As much of a runner as the hook sees, after the stage `report`."""
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    (work_dir / 'summary.csv').write_text(SUMMARY)
    pictures = []
    for index in range(MAX_PICTURES + 1):
        pictures.append(tmp_path / f'{index:03d}.jpg')
        Image.fromarray(np.full((8, 8 + index, 3), index, np.uint8)).save(pictures[-1])
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(work_dir / 'sqnr.png')
    loop = SimpleNamespace(
        options=SimpleNamespace(model='demo', quant='mse/w4a8', seed=3),
        recipe=SimpleNamespace(plain=lambda: RECIPE),
        gallery=SimpleNamespace(show_dir=tmp_path, pictures=pictures),
        work_dir=work_dir,
        result=RESULT,
        seconds={stage: 1.0 for stage in STAGES},
        memory_mb={stage: 10.0 for stage in STAGES},
        outcomes={},
        metrics=dict(fp=None, quant=None),
    )
    return SimpleNamespace(test_loop=loop, logger=logging.getLogger('test_wandb_report'))


def test_a_run_is_reported(runner, wandb, capfd):
    environment = dict(os.environ)
    hook = build_part(SOLVER_HOOKS, 'WandbReport', project='test', group='sweep', tags=('a', 'b'))
    hook.before_load(runner)
    assert children(), 'this test no longer sees the processes of wandb'
    hook.after_report(runner)
    # a hook's run ends once
    hook.after_failure(runner)

    run = read_run(runner.test_loop.work_dir)
    assert (run.start.project, run.start.run_group, list(run.start.tags)) == ('test', 'sweep', ['a', 'b'])
    assert run.start.display_name == 'demo mse/w4a8'
    del run.config['_wandb']
    assert run.config == dict(model='demo', quant='mse/w4a8', seed=3, series='demo mse', wxay='W4A8', **RECIPE)
    assert run.exit_code == 0
    for name, value in summary_of(RESULT).items():
        assert run.summary[name] == value
    assert table(run, 'quantizers') == dict(columns=SUMMARY.splitlines()[0].split(','), data=ROWS)
    pictures = [run.history[f'pictures/{index:03d}'] for index in range(MAX_PICTURES)]
    assert [picture['width'] for picture in pictures] == list(range(8, 8 + MAX_PICTURES))
    ranked = points(run, RANK, 'pictures/ranked')
    assert [ranked[rank + 1]['width'] for rank in range(MAX_PICTURES)] == list(range(8, 8 + MAX_PICTURES))
    for picture in (*pictures, *ranked.values(), run.history['plots/sqnr']):
        assert (run.folder / 'files' / picture['path']).is_file()

    out, err = capfd.readouterr()
    assert out == ''
    assert 'wandb' not in err
    assert not children()
    assert os.environ == environment
    assert wandb.run is None


def test_reconstruction_is_reported_as_soon_as_it_is_done(runner, wandb):
    loop = runner.test_loop
    loop.outcomes = {
        'encoder.0': Outcome(4.0, 1.0, 0.25, 0.0, torch.linspace(4, 1, 10)),
        'encoder.1': Outcome(2.0, 3.0, 0.5, 1.0, torch.linspace(2, 3, 10)),
    }
    write_outcomes(loop.work_dir / 'reconstruction.csv', loop.outcomes)
    plot_outcomes(loop.work_dir / 'reconstruction.png', loop.outcomes)
    hook = WandbReport()
    hook.before_load(runner)
    hook.after_reconstruct(runner)
    hook.after_failure(runner)
    run = read_run(loop.work_dir)
    assert table(run, 'units')['columns'] == list(OUTCOME_COLUMNS)
    assert table(run, 'units')['data'] == [['encoder.0', 4, 1, 0.25, 0.25, 0], ['encoder.1', 2, 3, 1.5, 0.5, 1]]
    assert (run.folder / 'files' / run.history['plots/reconstruction']['path']).is_file()
    curves = [row for row in run.rows if ITERATION in row]
    assert [row[ITERATION] for row in curves] == list(range(1, 11))
    assert curves[0]['unit_loss/encoder/0'] == 1.0 and curves[-1]['unit_loss/encoder/1'] == 1.5
    assert run.axes['unit_loss/*'] == ITERATION


def test_parts_that_learned_for_different_times(runner, wandb):
    loop = runner.test_loop
    loop.outcomes = {
        'encoder.0': Outcome(1.0, 1.0, 0.0, 0.0, torch.arange(3.0)),
        'decoder.0': Outcome(1.0, 1.0, 0.0, 0.0, torch.arange(2.0)),
    }
    write_outcomes(loop.work_dir / 'reconstruction.csv', loop.outcomes)
    hook = WandbReport()
    hook.before_load(runner)
    hook.after_reconstruct(runner)
    hook.after_failure(runner)
    run = read_run(loop.work_dir)
    for unit, length in {'encoder/0': 3, 'decoder/0': 2}.items():
        assert points(run, ITERATION, f'unit_loss/{unit}') == {index + 1: index for index in range(length)}


@pytest.mark.parametrize('stage', [*STAGES, 'failure'])
def test_nothing_is_reported_without_a_run(stage, runner):
    getattr(WandbReport(), 'after_failure' if stage == 'failure' else f'after_{stage}')(runner)


@pytest.mark.parametrize(
    'error, text',
    [
        (AssetError('x.pth: no such\n file'), 'x.pth: no such file'),
        (RuntimeError('boom'), 'RuntimeError: boom'),
        (KeyboardInterrupt(), 'KeyboardInterrupt'),
    ],
)
def test_a_failed_run_says_why(error, text, runner, wandb):
    hook = WandbReport()
    hook.before_load(runner)
    try:
        raise error
    except BaseException:
        hook.after_failure(runner)
    run = read_run(runner.test_loop.work_dir)
    assert (run.exit_code, run.summary['error']) == (1, text)
    assert not children()


@pytest.mark.parametrize('last', ['after_report', 'after_failure'])
def test_a_run_outlives_wandb(last, runner, wandb, caplog):
    """Its process may be the one that the system kills when memory is short."""
    hook = WandbReport()
    hook.before_load(runner)
    for process in children():
        os.kill(process, signal.SIGKILL)
    hook.after_calibrate(runner)
    getattr(hook, last)(runner)
    lines = [record.message for record in caplog.records if record.name == runner.logger.name]
    assert len(lines) == 1 and 'wandb is lost, the run goes on without it' in lines[0]
    assert 'WANDB_DATA_DIR' not in os.environ


def test_a_run_replaces_one_with_its_id(runner, wandb):
    """wandb cannot resume offline, and uploads what has one id on top of each other."""
    work_dir = runner.test_loop.work_dir
    for name, run_id in (('first', 'cell-1'), ('another', '1'), ('second', 'cell-1')):
        hook = WandbReport(name=name, id=run_id)
        hook.before_load(runner)
        hook.after_report(runner)
    runs = work_dir.glob('wandb/offline-run-*/run-*.wandb')
    assert sorted(path.name for path in runs) == ['run-1.wandb', 'run-cell-1.wandb']
    assert work_dir.joinpath('wandb/latest-run/run-cell-1.wandb').is_file()


@pytest.mark.parametrize(
    'labels, line',
    [
        (dict(id='a/b'), 'Run ID cannot contain the characters'),
        (dict(project='a:b'), "Invalid project name 'a:b'"),
        (dict(tags='x' * 65), 'Tags must be between 1 and 64 characters'),
    ],
)
def test_labels_that_wandb_refuses(labels, line, runner, wandb):
    with pytest.raises(ConfigError, match=line) as caught:
        WandbReport(**labels).before_load(runner)
    assert '\n' not in str(caught.value)
    assert not children()


def test_mmengine_builds_it_among_custom_hooks():
    hook = HOOKS.build(dict(type='ptqsam.WandbReport', project='mine'))
    assert isinstance(hook, WandbReport)
    assert hook.labels['project'] == 'mine'


def test_nothing_to_draw(runner, wandb):
    runner.test_loop.gallery = None
    (runner.test_loop.work_dir / 'sqnr.png').unlink()
    hook = WandbReport(name='mine')
    hook.before_load(runner)
    hook.after_report(runner)
    run = read_run(runner.test_loop.work_dir)
    assert run.start.display_name == 'mine'
    assert not [name for name in run.history if name.startswith(('plots/', 'pictures/'))]


def test_the_callers_own_run_stays_open(runner, wandb, tmp_path):
    settings = wandb.Settings(silent=True, console='off')
    with wandb.init(mode='offline', dir=str(tmp_path), settings=settings) as own:
        hook = WandbReport()
        hook.before_load(runner)
        assert hook.run.id != own.id
        hook.after_report(runner)
        assert wandb.run is own
        own.summary['x'] = 1
    wandb.teardown()  # until then the file may lack what was written last
    assert read_run(tmp_path).summary['x'] == 1
    assert 'x' not in read_run(runner.test_loop.work_dir).summary


def test_other_ranks_report_nothing(runner, monkeypatch):
    monkeypatch.setattr('ptqsam.report.wandb_report.is_main_process', lambda: False)
    hook = WandbReport()
    hook.before_load(runner)
    hook.after_report(runner)
    hook.after_failure(runner)
    assert not (runner.test_loop.work_dir / 'wandb').exists()


def test_mode_is_offline_unless_asked(runner, monkeypatch):
    monkeypatch.delenv('WANDB_MODE', raising=False)
    assert WandbReport().mode == 'offline'
    monkeypatch.setenv('WANDB_MODE', 'disabled')
    assert WandbReport().mode == 'disabled'
    assert WandbReport(mode='online').mode == 'online'
    monkeypatch.setenv('WANDB_SWEEP_ID', 'abc')
    assert WandbReport().mode == 'disabled'
    monkeypatch.delenv('WANDB_MODE')
    assert WandbReport().mode == 'online', 'an agent has to report to the server'
    with pytest.raises(ConfigError, match=r"mode .*'onlin'; use one of online, offline, disabled"):
        WandbReport(mode='onlin').before_load(runner)


def test_disabled_leaves_no_run(runner, wandb):
    hook = WandbReport(mode='disabled')
    hook.before_load(runner)
    hook.after_report(runner)
    assert not list(runner.test_loop.work_dir.glob('wandb/*run*'))


class Terminal(io.StringIO):
    """Somebody who could be asked for a login, and does not answer."""

    def isatty(self) -> bool:
        return True

    def readline(self, *_) -> str:
        raise AssertionError('wandb asks and waits')


def test_online_without_a_login(runner, wandb, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setattr('sys.stdin', Terminal())
    monkeypatch.setattr('sys.stderr.isatty', lambda: True, raising=False)
    with pytest.raises(ConfigError, match="does not start in mode 'online'"):
        WandbReport(mode='online').before_load(runner)
    assert not children()
    assert 'WANDB_DATA_DIR' not in os.environ


def test_wandb_not_installed(runner, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(ConfigError, match=r"pip install 'ptqsam\[wandb\]'"):
        WandbReport().before_load(runner)


def test_reports_do_not_need_wandb():
    code = (
        'import sys; sys.modules["wandb"] = None\n'
        'from ptqsam.registry import SOLVER_HOOKS\n'
        'print(SOLVER_HOOKS.build(dict(type="WandbReport")).mode)'
    )
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'WANDB_MODE': 'offline'}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, 'offline\n'), done.stderr
