"""tools/sweep.py as users run it: results, what is not computed again, failures, kills, two at a time, Ray."""

import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from ptqsam.sweep.cli import parse_args
from ptqsam.sweep.ledger import Ledger
from ptqsam.sweep.records import read_records
from tests.test_sweep.helpers import (
    kill,
    read_json,
    results,
    run_sweep_tool,
    start_sweep_tool,
    tools_of,
    write_sweep,
)
from tests.test_sweep.kills import kill_at_random


@pytest.fixture(scope='module')
def finished(tmp_path_factory, tiny) -> Path:
    """A sweep of three cells that has run: two are done, one asks for more images than there are."""
    folder = tmp_path_factory.mktemp('sweep')
    path = write_sweep(folder, tiny, include=[{'bits': 'w8a8', 'calibration.num_images': 50}])
    done = run_sweep_tool(path, '--work-dir', folder / 'sweep', '--jobs', 2, cwd=folder)
    assert done.returncode == 1, done.stderr
    (folder / 'told.txt').write_text(done.stdout + '\n' + done.stderr)
    return folder


@pytest.fixture
def again(finished, tmp_path) -> Path:
    """The same folder once more, to be changed."""
    shutil.copytree(finished, tmp_path / 'again')
    return tmp_path / 'again'


def test_cells_are_computed_and_a_failure_stops_no_other(finished):
    records = read_records(finished / 'sweep')
    assert [record.status for record in records] == ['done', 'done', 'failed']
    assert [record.bits for record in records] == [{'weight': b, 'act': b} for b in (4, 6, 8)]
    for record in records[:2]:
        assert record.result == read_json(record.folder / 'result.json')
        assert record.result['bits'] == record.bits and record.result['metrics']['fp'] is not None
        assert record.seconds > 0 and record.host
    assert 'calibration.num_images: 50 wanted, but the calibration set has 4' in records[2].error
    assert records[2].error.count('\n') == 0
    told = (finished / 'told.txt').read_text()
    assert '2 cells computed, 0 found done' in told and records[2].error in told and '--retry-failed' in told


def test_nothing_is_computed_again(again):
    before = results(again / 'sweep')
    done = run_sweep_tool(again / 'grid.yaml', '--work-dir', again / 'sweep', cwd=again)
    assert done.returncode == 1 and '0 cells computed, 2 found done' in done.stdout
    assert 'calibration.num_images: 50 wanted' in done.stderr, 'what failed before is told again'
    assert results(again / 'sweep') == before


def test_failed_cells_are_tried_on_demand_and_a_lost_ledger_costs_nothing(again):
    before = results(again / 'sweep')
    (again / 'sweep' / 'ledger.sqlite').write_bytes(b'nonsense' * 1000)
    done = run_sweep_tool(
        again / 'grid.yaml', '--work-dir', again / 'sweep', '--retry-failed', '--only', '*w8a8*', cwd=again
    )
    assert done.returncode == 1 and '1 cell' not in done.stdout
    assert 'damaged' in done.stderr
    assert [record.status for record in read_records(again / 'sweep')] == ['done', 'done', 'failed']
    assert results(again / 'sweep') == before


def test_dry_run_lists_and_writes_nothing(again, tmp_path):
    listed = run_sweep_tool(again / 'grid.yaml', '--work-dir', tmp_path / 'new', '--dry-run', cwd=again)
    assert listed.returncode == 0 and not (tmp_path / 'new').exists()
    lines = listed.stdout.split('\n')
    assert [line.split()[1] for line in lines[1:4]] == ['pending'] * 3 and lines[1].endswith(' GB')
    assert any(line.startswith('missing: calibration.num_images: 50 wanted') for line in lines)
    listed = run_sweep_tool(again / 'grid.yaml', '--work-dir', again / 'sweep', '--dry-run', cwd=again)
    assert [line.split()[1:3] for line in listed.stdout.split('\n')[1:3]] == [['done', 'took']] * 2


@pytest.mark.parametrize(
    'words, message',
    [
        (('--only', 'nothing*'), "no cell is called 'nothing*'"),
        (('--axes', 'bitz=w4a4'), "unknown axis 'bitz'"),
        (('--jobs', '0'), '--jobs must be at least 1'),
        (('--limit', '0'), '--limit must be at least 1'),
        (('--ray-address', 'auto'), '--ray-address needs --engine ray'),
        (('--quant-options', 'calibration.num_image=1'), "did you mean 'num_images'?"),
    ],
)
def test_bad_usage(again, words, message):
    done = run_sweep_tool(again / 'grid.yaml', '--work-dir', again / 'sweep', *words, cwd=again)
    assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr


def test_sweep_of_wandb_calls_back_for_each_cell(again):
    """What an agent would run, run here: it finds the cell done."""
    words = ('--work-dir', again / 'sweep', '--engine', 'wandb', '--wandb', 'project', '--only', '*w4a4*')
    written = run_sweep_tool(again / 'grid.yaml', *words, '--quant-options', 'calibration.max_boxes=4', cwd=again)
    assert written.returncode == 0, written.stderr
    definition = yaml.safe_load((again / 'sweep' / 'wandb-sweep.yaml').read_text())
    assert (definition['project'], definition['method']) == ('project', 'grid')
    [name] = definition['parameters']['cell']['values']
    own = [word for word in definition['command'] if '$' not in word]
    parsed = parse_args([*own, '--cell', name])
    assert (parsed.cell, parsed.wandb, parsed.quant_options) == (name, 'project', {'calibration.max_boxes': 4})
    own[own.index('project')] = 'other'
    done = run_sweep_tool(*own[:-2], '--cell', name, cwd=again)
    assert done.returncode == 0 and done.stderr.endswith('done\n'), done.stderr


def test_interrupted_driver_stops_its_cells_and_goes_on_later(tiny, tmp_path):
    path, folder = write_sweep(tmp_path, tiny), tmp_path / 'sweep'
    driver = start_sweep_tool(path, '--work-dir', folder, '--jobs', 2, cwd=tmp_path)
    wait_for(lambda: len(tools_of(folder)) == 2, driver)
    driver.send_signal(signal.SIGINT)
    told = driver.communicate(timeout=120)[0]
    assert driver.returncode == 130 and 'start the same command again' in told and 'Traceback' not in told
    assert tools_of(folder) == []
    assert {record.status for record in read_records(folder)} <= {'interrupted', 'pending', 'done'}
    done = run_sweep_tool(path, '--work-dir', folder, '--jobs', 2, cwd=tmp_path)
    assert done.returncode == 0 and len(results(folder)) == 2


def test_killed_driver_takes_its_cells_along(tiny, tmp_path):
    path, folder = write_sweep(tmp_path, tiny, {'bits': ['w4a4']}), tmp_path / 'sweep'
    driver = start_sweep_tool(path, '--work-dir', folder, cwd=tmp_path)
    wait_for(lambda: tools_of(folder), driver)
    kill(driver.pid)
    driver.communicate()
    # it holds the lock for a moment longer than it has a command line
    wait_for(lambda: [record.status for record in read_records(folder)] in (['interrupted'], ['done']))
    assert tools_of(folder) == []


def test_two_drivers_share_a_sweep(tiny, tmp_path):
    path, folder = write_sweep(tmp_path, tiny), tmp_path / 'sweep'
    drivers = [start_sweep_tool(path, '--work-dir', folder, '--jobs', 1, cwd=tmp_path) for _ in range(2)]
    told = [driver.communicate(timeout=600)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], told
    computed = [int(text.split(' cells computed')[0].split('\n')[-1]) for text in told]
    assert sum(computed) == 2, 'each cell once'


def test_kills_at_random_lose_nothing_and_repeat_nothing(tiny, tmp_path):
    path = write_sweep(tmp_path, tiny, {'bits': ['w4a4', 'w5a5', 'w6a6', 'w8a8']})
    report = kill_at_random(path, tmp_path / 'sweep', cells=4, kills=4, seed=0, pause=8.0)
    assert report.drivers + report.workers >= 1 and len(report.seen) == 4
    assert (report.lost, report.twice) == (0, 0), report


def test_ray_survives_the_loss_of_a_node(tiny, tmp_path):
    """A cluster of two nodes with a core each, one of which is lost while both work on a cell."""
    pytest.importorskip('ray', reason='Ray is not installed: pip install ptqsam[ray]')
    from ray.cluster_utils import Cluster

    path, folder = write_sweep(tmp_path, tiny), tmp_path / 'sweep'
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, object_store_memory=10**8))
    try:
        lost, _ = (cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2))
        words = ('--work-dir', folder, '--engine', 'ray', '--ray-address', cluster.address)
        driver = start_sweep_tool(path, *words, cwd=tmp_path)
        wait_for(lambda: len(tools_of(folder)) == 2, driver)
        cluster.remove_node(lost, allow_graceful=False)
        told = driver.communicate(timeout=600)[0]
    finally:
        cluster.shutdown()
    assert driver.returncode == 0, told
    records = read_records(folder)
    assert [record.status for record in records] == ['done', 'done']
    attempts = [len(Ledger(folder).attempts(record.key)) for record in records]
    assert sorted(attempts) == [1, 2], 'the one that was lost, once more'


def test_ray_that_cannot_be_reached_is_one_line(tiny, tmp_path):
    pytest.importorskip('ray', reason='Ray is not installed: pip install ptqsam[ray]')
    path = write_sweep(tmp_path, tiny)
    done = run_sweep_tool(
        path, '--work-dir', tmp_path / 'sweep', '--engine', 'ray', '--ray-address', '127.0.0.1:1', cwd=tmp_path
    )
    assert done.returncode == 2 and 'the Ray cluster 127.0.0.1:1 cannot be reached' in done.stderr
    assert 'Traceback' not in done.stderr


def wait_for(condition, process=None) -> None:
    """Wait until something holds, as long as a process lives."""
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.1)
