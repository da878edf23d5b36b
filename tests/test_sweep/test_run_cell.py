"""One cell: what each end of the tool is called, locks, interruption. The tool is a script that ends as it is told."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ptqsam.sweep import run_cell as module
from ptqsam.sweep.cells import Cell
from ptqsam.sweep.driver import open_ledger, plan
from ptqsam.sweep.ledger import LEDGER, Ledger
from ptqsam.sweep.lock import CONSOLE, locked
from ptqsam.sweep.records import read_records
from ptqsam.sweep.run_cell import Job, command, run_cell
from ptqsam.tool_process import reason

RESULT = {'metrics': {'fp': None, 'quant': {'segm_mAP': 0.5}}, 'compat': [], 'size_mb': {}}
# in the place of the tool; its arguments are what it does
FAKE = f"""
import json, os, signal, sys, time
from pathlib import Path
what, folder = sys.argv[1], Path(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)  # as the tool does; who starts the tests may ignore it
def result(): (folder / 'result.json').write_text({json.dumps(RESULT)!r})
print('progress 50%', end='\\r')
if what == 'good': result()
if what == 'missing': print('error: weights.pth: no such checkpoint; fetch it', file=sys.stderr); sys.exit(3)
if what == 'crash': raise KeyError(7)
if what == 'empty': print('nothing')
if what == 'memory': os.kill(os.getpid(), signal.SIGKILL)
if what == 'late': result(); os.kill(os.getpid(), signal.SIGKILL)
if what == 'lost' and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)
if what == 'lost': time.sleep(60)
if what == 'orphan': os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)
if what == 'slow':
    try:
        (folder / 'started').touch(); time.sleep(60)
    except KeyboardInterrupt:
        print('interrupted; run again'); sys.exit(130)
if what == 'env': (folder / 'env.json').write_text(json.dumps(dict(os.environ))); result()
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job for the script; its argument is what the script does."""
    script = tmp_path / 'fake.py'
    script.write_text(FAKE)
    monkeypatch.setattr(module, 'TOOL', (str(script),))

    def make(what: str, **changes) -> Job:
        folder = tmp_path / 'cells' / 'one'
        usual = dict(key='k', name='one', words=(what, str(folder)), processes=1, threads=1, env={})
        where = dict(sweep=str(tmp_path), folder=str(folder), cwd=str(tmp_path), planned=time.time())
        return Job(**(where | usual | changes))

    Ledger(tmp_path).plan([('k', 'one', {'folder': 'one'})])
    return make


def row(tmp_path: Path):
    return Ledger(tmp_path).rows()[0]


@pytest.mark.parametrize(
    'what, status, error',
    [
        ('good', 'done', ''),
        ('late', 'done', ''),
        ('missing', 'failed', 'error: weights.pth: no such checkpoint; fetch it'),
        ('crash', 'failed', 'exit code 1: KeyError: 7'),
        ('empty', 'failed', 'error: the tool ended without a result'),
        ('memory', 'interrupted', 'error: killed by SIGKILL; the system may have run out of memory'),
    ],
)
def test_ends(job, tmp_path, what, status, error):
    outcome = run_cell(job(what), {})
    assert outcome.status == status and outcome.error.startswith(error)
    assert outcome.computed == (status == 'done')
    assert '\n' not in outcome.error
    assert (row(tmp_path).status, row(tmp_path).error) == (status, outcome.error)
    assert row(tmp_path).metrics == (RESULT['metrics'] if status == 'done' else None)
    assert not locked(tmp_path / 'cells' / 'one')
    again = run_cell(job('good'), {})
    assert again.status == 'done' and again.computed == (status != 'done'), 'a result is never made twice'


def test_reason_is_of_the_last_attempt(job, tmp_path):
    assert run_cell(job('missing'), {}).error.startswith('error: weights.pth')
    assert run_cell(job('crash'), {}).error == 'exit code 1: KeyError: 7'


def test_reason_behind_bars_and_before_torchrun(tmp_path):
    console = tmp_path / CONSOLE
    console.write_bytes(b'calibrate: 3/9\rcalibrate: 4/9\xff error: x.jpg: broken\nstopped, because\n')
    assert reason(console, 0, 3) == 'error: x.jpg: broken'
    console.write_text('ValueError: 3\nE1 torch/distributed/elastic/multiprocessing/api.py:1] failed\nx\n')
    assert reason(console, 0, 1).startswith('exit code 1: ')
    console.write_text('')
    assert reason(console, 0, 9) == 'exit code 9'


def test_environment_of_the_run(job, tmp_path):
    run_cell(job('env', threads=3, env={'PTQSAM_DATA': '/there'}), {'CUDA_VISIBLE_DEVICES': '5'})
    env = json.loads((tmp_path / 'cells/one/env.json').read_text())
    wanted = dict(OMP_NUM_THREADS='3', PTQSAM_DATA='/there', CUDA_VISIBLE_DEVICES='5')
    assert {name: env[name] for name in wanted} == wanted and env['PTQSAM_PARENT'].isdigit()


def test_several_processes_are_started_by_torchrun(job):
    words = command(job('good', processes=4))
    assert words[1:5] == ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=4']
    assert words[-2:] == ['--launcher', 'pytorch']


def test_kills_around_torchrun(job, tmp_path):
    """Processes that outlive it hold the lock; one that is killed below it leaves a cell that goes on."""
    folder = tmp_path / 'cells' / 'one'
    outcome = run_cell(job('orphan', processes=2), {})
    assert outcome.status == 'interrupted' and outcome.error.startswith('error: killed by SIGKILL')
    assert locked(folder) and run_cell(job('good'), {}).status == 'busy'
    subprocess.run(['pkill', '-9', '-f', str(folder)], check=True)
    while locked(folder):
        time.sleep(0.05)
    # one of them is killed, not torchrun
    outcome = run_cell(job('lost', processes=2), {})
    assert outcome.status == 'interrupted' and outcome.error.startswith('error: killed by SIGKILL')
    assert run_cell(job('good'), {}).computed


def start(job: Job, **settings) -> tuple[threading.Thread, list]:
    """Run a cell in a thread, once its script has started."""
    outcomes: list = []
    thread = threading.Thread(target=lambda: outcomes.append(run_cell(job, {}, **settings)))
    thread.start()
    started = Path(job.folder) / 'started'
    while not started.exists():
        time.sleep(0.02)
    return thread, outcomes


def test_stop_interrupts_the_run(job, tmp_path):
    stop = threading.Event()
    thread, outcomes = start(job('slow'), stop=stop)
    assert locked(tmp_path / 'cells' / 'one') and row(tmp_path).status == 'running'
    stop.set()
    thread.join()
    assert outcomes[0].status == row(tmp_path).status == 'interrupted'


def test_cell_of_another_process_is_busy_or_waited_for(job, tmp_path):
    stop = threading.Event()
    thread, outcomes = start(job('slow'), stop=stop)
    assert run_cell(job('good'), {}).status == 'busy'
    waiting: list = []
    other = threading.Thread(target=lambda: waiting.append(run_cell(job('good'), {}, wait=True)))
    other.start()
    stop.set()
    for one in (thread, other):
        one.join()
    assert outcomes[0].status == 'interrupted' and waiting[0].status == 'done' and waiting[0].computed


def test_lock_outlives_the_starter(job, tmp_path):
    """The tool inherits it: a cell whose starter was killed is not started a second time beside it."""
    code = (
        'import sys; from ptqsam.sweep import run_cell as module; from ptqsam.sweep.run_cell import Job, run_cell\n'
        f'module.TOOL = {module.TOOL!r}; run_cell({job("slow")!r}, {{}})'
    )
    starter = subprocess.Popen([sys.executable, '-c', code])
    while not (tmp_path / 'cells/one/started').exists():
        time.sleep(0.05)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    assert locked(tmp_path / 'cells' / 'one') and run_cell(job('good'), {}).status == 'busy'
    subprocess.run(['pkill', '-9', '-f', str(tmp_path / 'cells/one')], check=True)
    while locked(tmp_path / 'cells' / 'one'):
        time.sleep(0.05)
    assert run_cell(job('good'), {}).computed


def test_damaged_result_is_one_line_and_not_overwritten(job, tmp_path):
    folder = tmp_path / 'cells' / 'one'
    folder.mkdir(parents=True)
    (folder / 'result.json').write_text('{')
    outcome = run_cell(job('good'), {})
    assert outcome.status == 'failed' and 'no result of tools/test_quant.py' in outcome.error
    assert (folder / 'result.json').read_text() == '{'


def test_failure_that_another_driver_has_seen_is_taken_over(job, tmp_path):
    late = job('good')
    assert run_cell(job('missing'), {}).status == 'failed'
    assert run_cell(late, {}).error.startswith('error: weights.pth'), 'planned before that failure'
    assert run_cell(job('good'), {}).computed, 'asked for after it'


def test_damaged_ledger_costs_no_cell(job, tmp_path, capsys):
    run_cell(job('good'), {})
    (tmp_path / LEDGER).write_bytes(b'x' * 5000)
    assert run_cell(job('good'), {}).status == 'done'
    (tmp_path / 'cells/one/result.json').unlink()
    assert run_cell(job('good'), {}).computed
    assert 'the ledger cannot be used' in capsys.readouterr().err


def test_damaged_result_is_an_error_of_its_cell_alone(job, tmp_path):
    run_cell(job('good'), {})
    spec = dict(model_name='m', recipe_name='r', bits={}, seed=0, varied={}, model='m', recipe='r', arguments=[])
    cells = [
        Cell(**spec, name=name, key=key, folder=name, pictures=False) for name, key in (('one', 'k'), ('two', 'l'))
    ]
    (tmp_path / 'cells/one/result.json').write_text('{')
    [row, _] = plan(tmp_path, cells)
    first, second = read_records(tmp_path)
    assert (first.status, second.status) == ('failed', 'pending') and 'remove it' in first.error == row.error
    (tmp_path / 'cells/one/result.json').unlink()
    [row, _] = plan(tmp_path, cells)
    assert row.status == 'interrupted', 'and runs again'


def test_ledger_that_is_damaged_is_put_aside(job, tmp_path, capsys):
    run_cell(job('good'), {})
    (tmp_path / LEDGER).write_bytes(b'x' * 5000)
    ledger = open_ledger(tmp_path)
    told = capsys.readouterr().err
    assert told.count('\n') == 1 and 'damaged' in told
    assert len(list(tmp_path.glob(f'{LEDGER}.damaged-*'))) == 1
    assert ledger.rows() == []
