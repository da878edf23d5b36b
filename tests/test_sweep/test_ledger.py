"""The ledger: what it remembers, several writers, damage."""

import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from ptqsam.errors import AssetError, ConfigError
from ptqsam.sweep.ledger import LEDGER, Ledger, noted

CELLS = [('a1', 'model/mse_w4a4', {'folder': 'x'}), ('b2', 'model/mse_w6a6', {'folder': 'y'})]


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    ledger = Ledger(tmp_path)
    ledger.plan(CELLS)
    return ledger


def states(ledger: Ledger) -> dict[str, str]:
    return {row.key: row.status for row in ledger.rows()}


def test_planned_cells_are_pending_in_order(ledger):
    rows = ledger.rows()
    assert [(row.key, row.name, row.spec) for row in rows] == CELLS
    assert {row.status for row in rows} == {'pending'}
    assert rows[0].seconds is None and rows[0].metrics is None and rows[0].error == '' and rows[0].host == ''


def test_life_of_a_cell(ledger):
    first = ledger.start('a1', 'host', 7)
    assert states(ledger) == {'a1': 'running', 'b2': 'pending'}
    ledger.finish('a1', first, 'failed', 'error: no such thing', None)
    row = ledger.rows()[0]
    assert (row.status, row.error, row.host) == ('failed', 'error: no such thing', 'host')
    second = ledger.start('a1', 'other', 8)
    assert ledger.rows()[0].error == '', 'an error is gone when the cell is tried again'
    ledger.finish('a1', second, 'done', '', {'quant': {'segm_mAP': 0.5}, 'fp': None})
    row = ledger.rows()[0]
    assert row.status == 'done' and row.metrics == {'quant': {'segm_mAP': 0.5}, 'fp': None}
    attempts = ledger.attempts('a1')
    assert [(one['host'], one['pid'], one['status']) for one in attempts] == [
        ('host', 7, 'failed'),
        ('other', 8, 'done'),
    ]
    assert row.seconds == pytest.approx(sum(one['ended'] - one['started'] for one in attempts))


def test_plan_keeps_what_is_known_and_hides_what_is_left_out(ledger):
    ledger.finish('a1', ledger.start('a1', 'host', 1), 'done', '', {})
    ledger.plan([('c3', 'new', {}), ('a1', 'renamed', {'folder': 'z'})])
    assert [(row.key, row.name, row.status) for row in ledger.rows()] == [
        ('c3', 'new', 'pending'),
        ('a1', 'renamed', 'done'),
    ]
    ledger.plan(CELLS)
    assert states(ledger) == {'a1': 'done', 'b2': 'pending'}, 'a cell that comes back is still done'


def test_what_another_process_has_noted_meanwhile_counts(ledger):
    attempt = ledger.start('a1', 'host', 1)
    ledger.finish('a1', attempt, 'failed', 'error: no weights', None)
    ledger.settle('a1', 'interrupted', 'its process is gone', was='running')
    assert (ledger.rows()[0].status, ledger.rows()[0].error) == ('failed', 'error: no weights')
    ledger.start('a1', 'host', 2)
    ledger.settle('a1', 'interrupted', 'its process is gone', was='running')
    assert ledger.rows()[0].status == 'interrupted'


def test_attempt_of_a_process_that_is_gone_is_closed(ledger):
    ledger.start('a1', 'host', 1)
    ledger.settle('a1', 'interrupted', 'its process is gone')
    assert states(ledger)['a1'] == 'interrupted'
    assert [one['status'] for one in ledger.attempts('a1')] == ['interrupted']
    ledger.start('a1', 'host', 2)
    ledger.settle('a1', 'done', metrics={})
    assert [one['status'] for one in ledger.attempts('a1')] == ['interrupted', 'done']


def count_up(folder: Path, key: str, times: int) -> None:
    for _ in range(times):
        ledger = Ledger(folder)
        ledger.finish(key, ledger.start(key, 'host', 1), 'interrupted', '', None)


def test_several_processes_write(ledger, tmp_path):
    context = multiprocessing.get_context('spawn')
    writers = [context.Process(target=count_up, args=(tmp_path, key, 25)) for key in ('a1', 'a1', 'b2')]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert (len(ledger.attempts('a1')), len(ledger.attempts('b2'))) == (50, 25), 'no attempt is lost'


@pytest.mark.parametrize('content', [b'no database at all' * 400, b'SQLite format 3\x00' + b'\xff' * 4096])
def test_damaged_ledger_is_one_line(tmp_path, content):
    (tmp_path / LEDGER).write_bytes(content)
    with pytest.raises(AssetError, match='damaged, or no ledger') as caught:
        Ledger(tmp_path)
    assert '\n' not in str(caught.value)


def test_damage_inside_is_found(ledger, tmp_path):
    for number in range(300):
        ledger.finish('a1', ledger.start('a1', f'host {number} ' + 'x' * 200, 1), 'failed', 'y' * 300, None)
    content = bytearray((tmp_path / LEDGER).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 6000] = b'\xa5' * 6000
    (tmp_path / LEDGER).write_bytes(bytes(content))
    with pytest.raises(AssetError, match='damaged'):
        Ledger(tmp_path)


def test_ledger_of_another_version_is_refused(ledger, tmp_path):
    database = sqlite3.connect(tmp_path / LEDGER)
    database.execute('PRAGMA user_version = 99')
    database.close()
    with pytest.raises(ConfigError, match='another version'):
        Ledger(tmp_path)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='cannot be'):
        Ledger(tmp_path / 'file')


def test_write_that_fails_is_told_and_no_more(ledger, tmp_path, capsys):
    """A full disk: SQLite says so by an OperationalError."""
    database = sqlite3.connect(tmp_path / LEDGER)
    database.execute(
        'CREATE TRIGGER full BEFORE UPDATE ON cells BEGIN SELECT RAISE(ABORT, "database or disk is full"); END'
    )
    database.close()
    assert noted(lambda: ledger.settle('a1', 'done')) is None
    told = capsys.readouterr().err
    assert 'warning: the ledger cannot be used' in told and told.count('\n') == 1
    assert states(ledger)['a1'] == 'pending'
