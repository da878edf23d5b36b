"""Report to wandb: read back from the file that an offline run leaves."""

import io
import json
import logging
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.registry import HOOKS
from PIL import Image

from ptqsam.errors import ConfigError
from ptqsam.reconstruction.optimise import Outcome
from ptqsam.registry import SOLVER_HOOKS, build_part
from ptqsam.report import WandbReport
from ptqsam.report.reconstruction import COLUMNS as OUTCOME_COLUMNS
from ptqsam.report.reconstruction import plot_outcomes, point_ends, shortened, write_outcomes
from ptqsam.report.wandb_report import ITERATION, MAX_PICTURES, curve_points, read_table, summary_of
from tests.tiny import ROOT

SUMMARY = """path,role,kind,quantizer,bits,observer,rule,sqnr_db,cosine
a.input,encoder.a.input,act,Uniform,4,MSE,"rule 1 'a, b'",12.50,0.987000
a.weight,encoder.a.weight,weight,Uniform,4,MinMax,built-in '*',inf,1.000000
b.input,encoder.b.input,act,Uniform,8,MSE,built-in '*',,
"""
ROWS = [
    ['a.input', 'encoder.a.input', 'act', 'Uniform', 4, 'MSE', "rule 1 'a, b'", 12.5, 0.987],
    ['a.weight', 'encoder.a.weight', 'weight', 'Uniform', 4, 'MinMax', "built-in '*'", None, 1.0],
    ['b.input', 'encoder.b.input', 'act', 'Uniform', 8, 'MSE', "built-in '*'", None, None],
]
RECIPE = dict(algorithm='mse', bits=dict(weight=4, act=8), rules=[dict(match='*', bits=4)])
RESULT = dict(
    metrics=dict(fp=dict(segm_mAP=0.5), quant=dict(segm_mAP=0.25)),
    size_mb=dict(fp=40.0, packed=5.0),
    seconds=dict(calibrate=1.5),
    peak_memory_mb=100.0,
    compat=['soft_weights'],
    images=7,
    model='demo',
)


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
        gallery=SimpleNamespace(pictures=pictures),
        work_dir=work_dir,
        result=RESULT,
    )
    return SimpleNamespace(test_loop=loop, logger=logging.getLogger('test_wandb_report'))


@pytest.fixture
def wandb(monkeypatch):
    """The module, with none of the caller's settings; what a test leaves running is ended."""
    module = pytest.importorskip('wandb')
    for name in [name for name in os.environ if name.startswith('WANDB_')]:
        monkeypatch.delenv(name)
    yield module
    module.teardown()


def read_run(work_dir: Path) -> SimpleNamespace:
    """Content of the one offline run in a work dir."""
    from wandb.proto import wandb_internal_pb2

    (path,) = work_dir.glob('wandb/offline-run-*/run-*.wandb')
    run = SimpleNamespace(config={}, summary={}, history={}, rows=[], axes={}, start=None, exit_code=None)
    run.folder = path.parent
    for data in read_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        match record.WhichOneof('record_type'):
            case 'run':
                run.start = record.run
                run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            case 'summary':
                merge(run.summary, record.summary.update)
            case 'history':
                merge(run.history, record.history.item)
                run.rows.append({})
                merge(run.rows[-1], record.history.item)
            case 'metric':
                run.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            case 'exit':
                run.exit_code = record.exit.exit_code
    return run


def merge(values: dict, items) -> None:
    """Put the items of a record into a dict, those of a picture or table into one of their own."""
    for item in items:
        *parents, key = item.nested_key or [item.key]
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = json.loads(item.value_json)


def read_records(data: bytes) -> list[bytes]:
    """Records of a file in LevelDB's log format: 7 bytes of file header, blocks of 32 KiB, chunks with crc, length
    and type (1 whole, 2 first, 3 middle, 4 last)."""
    block, position, records, parts = 2**15, 7, [], []
    while position < len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from('<IHB', data, position)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):
            records.append(b''.join(parts))
            parts = []
    assert not parts, 'the file ends within a record'
    return records


def children() -> list[str]:
    """Command lines of this process's children that belong to wandb."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            parent = int(stat.read_text().rpartition(')')[2].split()[1])
            command = (stat.parent / 'cmdline').read_text()
        except (OSError, IndexError):
            continue
        if parent == os.getpid() and 'wandb' in command:
            found.append(command)
    return found


def test_a_run_is_reported(runner, wandb, capfd):
    environment = dict(os.environ)
    hook = build_part(SOLVER_HOOKS, 'WandbReport', project='test', group='sweep', tags=('a', 'b'))
    hook.before_prepare(runner)
    assert children(), 'this test no longer sees the processes of wandb'
    hook.after_report(runner)
    # a hook's run ends once
    hook.after_failure(runner)

    run = read_run(runner.test_loop.work_dir)
    assert (run.start.project, run.start.run_group, list(run.start.tags)) == ('test', 'sweep', ['a', 'b'])
    assert run.start.display_name == 'demo mse/w4a8'
    del run.config['_wandb']
    assert run.config == dict(model='demo', quant='mse/w4a8', seed=3, **RECIPE)
    assert run.exit_code == 0
    for name, value in summary_of(RESULT).items():
        assert run.summary[name] == value
    table = json.loads((run.folder / 'files' / run.history['quantizers']['path']).read_text())
    assert table == dict(columns=SUMMARY.splitlines()[0].split(','), data=ROWS)
    pictures = [run.history[name] for name in sorted(run.history) if name.startswith('pictures/')]
    assert [picture['width'] for picture in pictures] == list(range(8, 8 + MAX_PICTURES))
    for picture in (*pictures, run.history['sqnr']):
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
    hook.before_prepare(runner)
    hook.after_reconstruct(runner)
    hook.after_failure(runner)
    run = read_run(loop.work_dir)
    table = json.loads((run.folder / 'files' / run.history['units']['path']).read_text())
    assert table['columns'] == list(OUTCOME_COLUMNS)
    assert table['data'] == [['encoder.0', 4, 1, 0.25, 0.25, 0], ['encoder.1', 2, 3, 1.5, 0.5, 1]]
    assert (run.folder / 'files' / run.history['reconstruction']['path']).is_file()
    curves = [row for row in run.rows if ITERATION in row]
    assert [row[ITERATION] for row in curves] == list(range(1, 11))
    assert curves[0]['unit_loss/encoder.0'] == 1.0 and curves[-1]['unit_loss/encoder.1'] == 1.5
    assert run.axes['unit_loss/*'] == ITERATION


def test_parts_that_learned_for_different_times(runner, wandb):
    loop = runner.test_loop
    loop.outcomes = {
        'encoder.0': Outcome(1.0, 1.0, 0.0, 0.0, torch.arange(3.0)),
        'decoder.0': Outcome(1.0, 1.0, 0.0, 0.0, torch.arange(2.0)),
    }
    write_outcomes(loop.work_dir / 'reconstruction.csv', loop.outcomes)
    hook = WandbReport()
    hook.before_prepare(runner)
    hook.after_reconstruct(runner)
    hook.after_failure(runner)
    curves = [row for row in read_run(loop.work_dir).rows if ITERATION in row]
    for unit, length in {'encoder.0': 3, 'decoder.0': 2}.items():
        points = {row[ITERATION]: row[name] for row in curves if (name := f'unit_loss/{unit}') in row}
        assert points == {iteration + 1: iteration for iteration in range(length)}


@given(st.dictionaries(st.sampled_from('abc'), st.integers(1, 300)))
def test_every_curve_keeps_its_own_iterations(lengths):
    """One ascending axis for all; each curve has its points there and no others, whatever else is logged."""
    curves = {name: np.arange(length) / length for name, length in lengths.items()}
    points = list(curve_points(curves))
    axis = [point[ITERATION] for point in points]
    assert axis == sorted(set(axis))
    for name, curve in curves.items():
        assert [point[ITERATION] for point in points if name in point] == point_ends(len(curve))
        assert [point[name] for point in points if name in point] == shortened(curve).tolist()


def test_reconstruction_without_a_run(runner):
    WandbReport().after_reconstruct(runner)


def test_long_curves_are_shortened():
    points = list(curve_points({'a': np.arange(20000.0), 'b': np.ones(20000)}))
    assert 20 < len(points) < 200
    assert points[-1][ITERATION] == 20000
    assert all(point['b'] == 1 for point in points)
    assert not list(curve_points({}))


def test_a_failed_run_is_marked(runner, wandb):
    hook = WandbReport()
    hook.before_prepare(runner)
    hook.after_failure(runner)
    assert read_run(runner.test_loop.work_dir).exit_code == 1
    assert not children()


def test_mmengine_builds_it_among_custom_hooks():
    hook = HOOKS.build(dict(type='ptqsam.WandbReport', project='mine'))
    assert isinstance(hook, WandbReport)
    assert hook.labels['project'] == 'mine'


def test_nothing_to_draw(runner, wandb):
    runner.test_loop.gallery = None
    (runner.test_loop.work_dir / 'sqnr.png').unlink()
    hook = WandbReport(name='mine')
    hook.before_prepare(runner)
    hook.after_report(runner)
    run = read_run(runner.test_loop.work_dir)
    assert run.start.display_name == 'mine'
    assert {name for name in run.history if not name.startswith('_')} == {'quantizers'}


def test_the_callers_own_run_stays_open(runner, wandb, tmp_path):
    settings = wandb.Settings(silent=True, console='off')
    with wandb.init(mode='offline', dir=str(tmp_path), settings=settings) as own:
        hook = WandbReport()
        hook.before_prepare(runner)
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
    hook.before_prepare(runner)
    hook.after_report(runner)
    hook.after_failure(runner)
    assert not (runner.test_loop.work_dir / 'wandb').exists()


def test_mode_is_offline_unless_asked(runner, monkeypatch):
    monkeypatch.delenv('WANDB_MODE', raising=False)
    assert WandbReport().mode == 'offline'
    monkeypatch.setenv('WANDB_MODE', 'disabled')
    assert WandbReport().mode == 'disabled'
    assert WandbReport(mode='online').mode == 'online'
    with pytest.raises(ConfigError, match=r"mode .*'onlin'; use one of online, offline, disabled"):
        WandbReport(mode='onlin').before_prepare(runner)


def test_disabled_leaves_no_run(runner, wandb):
    hook = WandbReport(mode='disabled')
    hook.before_prepare(runner)
    hook.after_report(runner)
    assert not list(runner.test_loop.work_dir.glob('wandb/*run*'))


def test_online_without_a_login(runner, wandb, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
    monkeypatch.setattr('sys.stdin', io.StringIO())
    with pytest.raises(ConfigError, match="does not start in mode 'online'"):
        WandbReport(mode='online').before_prepare(runner)
    assert not children()
    assert 'WANDB_DATA_DIR' not in os.environ


def test_wandb_not_installed(runner, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(ConfigError, match=r"pip install 'ptqsam\[wandb\]'"):
        WandbReport().before_prepare(runner)


def test_reports_do_not_need_wandb():
    code = (
        'import sys; sys.modules["wandb"] = None\n'
        'from ptqsam.registry import SOLVER_HOOKS\n'
        'print(SOLVER_HOOKS.build(dict(type="WandbReport")).mode)'
    )
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'WANDB_MODE': 'offline'}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, 'offline\n'), done.stderr


def test_summary_names():
    assert summary_of(RESULT) == {
        'fp/segm_mAP': 0.5,
        'quant/segm_mAP': 0.25,
        'drop/segm_mAP': 0.25,
        'size_mb/fp': 40.0,
        'size_mb/packed': 5.0,
        'seconds/calibrate': 1.5,
        'peak_memory_mb': 100.0,
        'compat': ['soft_weights'],
        'images': 7,
    }
    only_quant = summary_of(RESULT | dict(metrics=dict(fp=None, quant=dict(segm_mAP=0.25))))
    assert 'drop/segm_mAP' not in only_quant
    assert 'fp/segm_mAP' not in only_quant


def test_table_has_numbers(tmp_path):
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    columns, rows = read_table(tmp_path / 'summary.csv')
    assert columns == SUMMARY.splitlines()[0].split(',')
    assert rows == ROWS
