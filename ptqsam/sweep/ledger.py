"""The ledger of a sweep: a SQLite file that says what became of each cell. Several processes write to it.

It is an index, not the truth: a cell is done when its folder holds `result.json`, which appears by a rename. So a
ledger that is lost, damaged or could not be written costs nothing that was computed; the next start fills it again.
"""

import json
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ptqsam.errors import AssetError, ConfigError, PTQSAMError

Status = Literal['pending', 'running', 'done', 'failed', 'interrupted']
LEDGER = 'ledger.sqlite'
_FORMAT = 1
_SCHEMA = """
CREATE TABLE cells (
    key TEXT PRIMARY KEY, name TEXT NOT NULL, position INTEGER, spec TEXT NOT NULL, status TEXT NOT NULL,
    error TEXT NOT NULL DEFAULT '', metrics TEXT, seconds REAL, host TEXT NOT NULL DEFAULT ''
);
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, started REAL NOT NULL,
    ended REAL, status TEXT NOT NULL DEFAULT 'running', error TEXT NOT NULL DEFAULT ''
);
"""
# seconds that a writer waits for the others
_PATIENCE = 60.0


@dataclass(frozen=True)
class Row:
    """A cell in the ledger.

    Attributes:
        key: fingerprint of what the cell computes.
        name: of the cell, unique in a sweep.
        spec: `Cell.plain()`.
        status: what became of it.
        error: one line, '' if there is none.
        metrics: of the quantized and the float model, as in `result.json`; None until it is done.
        seconds: wall time of all attempts; None before the first ended.
        host: where the last attempt ran, '' before the first.
    """

    key: str
    name: str
    spec: dict[str, Any]
    status: Status
    error: str
    metrics: dict[str, Any] | None
    seconds: float | None
    host: str


class Ledger:
    """The ledger of the sweep in a folder; made if there is none.

    Each call is one transaction on a connection of its own, so that processes and threads may share a ledger, and a
    process that is killed leaves it as it was before the call or after it.

    Args:
        folder: of the sweep.

    Raises:
        AssetError: the file is no ledger, or a damaged one.
        ConfigError: it cannot be written there, or is of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._transaction() as database:
                version = database.execute('PRAGMA user_version').fetchone()[0]
                if version not in (0, _FORMAT):
                    raise ConfigError(f'{self.path}: written by another version of ptqsam; choose another --work-dir')
                # two processes may make it at the same time; the second one finds it made
                if version == 0:
                    for statement in _SCHEMA.split(';'):
                        database.execute(statement)
                    database.execute(f'PRAGMA user_version = {_FORMAT}')
                if database.execute('PRAGMA quick_check').fetchone()[0] != 'ok':
                    raise sqlite3.DatabaseError('its pages contradict each other')
        except OSError as error:
            raise ConfigError(f'{folder}: cannot be made ({error.strerror}); choose another --work-dir') from None
        except sqlite3.DatabaseError as error:
            raise AssetError(
                f'{self.path}: damaged, or no ledger ({error}); move it away and start the sweep again: what is '
                'finished is taken in from the folders of the cells'
            ) from None

    def plan(self, cells: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        """Say which cells the sweep has now; those that are known keep their status, others stay but are not listed.

        Args:
            cells: key, name and spec of each, in order.
        """
        with self._transaction() as database:
            database.execute('UPDATE cells SET position = NULL')
            database.executemany(
                "INSERT INTO cells (key, name, position, spec, status) VALUES (?, ?, ?, ?, 'pending') "
                'ON CONFLICT (key) DO UPDATE SET name = excluded.name, position = excluded.position, '
                'spec = excluded.spec',
                [(key, name, number, json.dumps(spec)) for number, (key, name, spec) in enumerate(cells)],
            )

    def rows(self, keys: Sequence[str] | None = None) -> list[Row]:
        """The cells of the sweep, in order.

        Args:
            keys: of the cells, in order; default those that were planned last.

        Raises:
            AssetError: the file is damaged.
        """
        try:
            with self._connection() as database:
                found = database.execute(
                    'SELECT key, name, spec, status, error, metrics, seconds, host FROM cells '
                    + ('WHERE position IS NOT NULL ' if keys is None else '')
                    + 'ORDER BY position'
                ).fetchall()
            if keys is not None:
                by_key = {row[0]: row for row in found}
                found = [by_key[key] for key in keys]
            return [
                Row(key, name, json.loads(spec), status, error, json.loads(metrics or 'null'), seconds, host)
                for key, name, spec, status, error, metrics, seconds, host in found
            ]
        except (sqlite3.DatabaseError, ValueError) as error:
            raise AssetError(f'{self.path}: damaged ({error}); move it away and start the sweep again') from None

    def attempts(self, key: str) -> list[dict[str, Any]]:
        """Attempts at a cell, in order: host, pid, started, ended (seconds since 1970), status, error."""
        names = ('host', 'pid', 'started', 'ended', 'status', 'error')
        with self._connection() as database:
            found = database.execute(f'SELECT {", ".join(names)} FROM attempts WHERE key = ? ORDER BY id', (key,))
            return [dict(zip(names, row, strict=True)) for row in found]

    def start(self, key: str, host: str, pid: int) -> int:
        """Note that a process begins to work on a cell.

        Returns:
            Number of the attempt.
        """
        with self._transaction() as database:
            database.execute("UPDATE attempts SET status = 'interrupted' WHERE key = ? AND status = 'running'", (key,))
            database.execute("UPDATE cells SET status = 'running', error = '', host = ? WHERE key = ?", (host, key))
            number = database.execute(
                'INSERT INTO attempts (key, host, pid, started) VALUES (?, ?, ?, ?)', (key, host, pid, time.time())
            ).lastrowid
        assert number is not None
        return number

    def finish(self, key: str, attempt: int, status: Status, error: str, metrics: dict[str, Any] | None) -> None:
        """Note how an attempt ended.

        Args:
            key: of the cell.
            attempt: from `start`.
            status: what became of it.
            error: one line, '' if there is none.
            metrics: as in `result.json`, None if the cell is not done.
        """
        with self._transaction() as database:
            database.execute(
                'UPDATE attempts SET ended = ?, status = ?, error = ? WHERE id = ?',
                (time.time(), status, error, attempt),
            )
            self._settle(database, key, status, error, metrics)

    def settle(
        self,
        key: str,
        status: Status,
        error: str = '',
        metrics: dict[str, Any] | None = None,
        was: Status | None = None,
    ) -> None:
        """Note what became of a cell without an attempt: found done, or left by a process that is gone.

        Args:
            key: of the cell.
            status: what became of it.
            error: one line, '' if there is none.
            metrics: as in `result.json`, None if the cell is not done.
            was: what it is known as; otherwise another process has settled it meanwhile, which counts. None: whatever.
        """
        with self._transaction() as database:
            now = database.execute('SELECT status FROM cells WHERE key = ?', (key,)).fetchone()
            if was is not None and now != (was,):
                return
            database.execute(
                "UPDATE attempts SET status = ? WHERE key = ? AND status = 'running'",
                ('done' if status == 'done' else 'interrupted', key),
            )
            self._settle(database, key, status, error, metrics)

    @staticmethod
    def _settle(database: sqlite3.Connection, key: str, status: Status, error: str, metrics: Any) -> None:
        database.execute(
            'UPDATE cells SET status = ?, error = ?, metrics = ?, '
            'seconds = (SELECT SUM(ended - started) FROM attempts WHERE attempts.key = cells.key) WHERE key = ?',
            (status, error, None if metrics is None else json.dumps(metrics), key),
        )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        # the usual journal, because that in shared memory (WAL) does not work on network file systems
        database = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)
        try:
            yield database
        finally:
            database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._connection() as database:
                database.execute('BEGIN IMMEDIATE')
                yield database
                database.execute('COMMIT')
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f'{self.path}: cannot be written ({error}); make room, or choose another --work-dir'
            ) from None


def noted(call: Callable[[], Any]) -> Any:
    """Write to a ledger, or say that it cannot be written: the work goes on, the next start fills the ledger again.

    Args:
        call: the writing.

    Returns:
        What the call does; None if it failed.
    """
    try:
        return call()
    except (sqlite3.Error, OSError, PTQSAMError) as error:
        print(
            f'warning: the ledger cannot be used ({error}); results stay in the folders of the cells, and the next '
            'start of the sweep takes them in',
            file=sys.stderr,
            flush=True,
        )
        return None
