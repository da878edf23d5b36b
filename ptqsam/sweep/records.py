"""What a sweep has computed so far, for reports and dashboards."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptqsam.errors import AssetError, ConfigError
from ptqsam.sweep.ledger import LEDGER, Ledger, Status
from ptqsam.sweep.lock import locked

RESULT = 'result.json'


@dataclass(frozen=True)
class Record:
    """A cell of a sweep, finished or not.

    Attributes:
        name: unique in the sweep, `oracle_mobile-sam/mse_w4a4`.
        key: fingerprint of what it computes.
        model: name of the pipeline, `oracle_mobile-sam`.
        recipe: name of the recipe without bits, `mse`.
        bits: of weights and of activations, and those of parts that differ: `Bits.resolved()` of the recipe.
        seed: of calibration images and boxes.
        options: further overrides in which cells of the sweep differ, dotted; those of the pipeline begin with `cfg:`.
        status: what became of it.
        result: content of `result.json`; None if it is not done.
        error: one line, '' if there is none.
        folder: its work dir.
        seconds: wall time of all attempts; None if that is not known.
        host: where the last attempt ran, '' if that is not known.
        words: arguments of `tools/test_quant.py` without those that say where things go; none if they are not known.
    """

    name: str
    key: str
    model: str
    recipe: str
    bits: dict[str, Any]
    seed: int
    options: dict[str, Any]
    status: Status
    result: dict[str, Any] | None
    error: str
    folder: Path
    seconds: float | None
    host: str
    words: tuple[str, ...] = ()


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / LEDGER).is_file()


def read_records(folder: Path) -> list[Record]:
    """The cells of a sweep, in order.

    Args:
        folder: of the sweep.

    Raises:
        ConfigError: no sweep there.
        AssetError: the ledger is damaged. A damaged `result.json` is the error of its cell.
    """
    if not is_sweep(folder):
        raise ConfigError(f'{folder}: no sweep there; name the --work-dir of tools/sweep.py')
    records = []
    for row in Ledger(folder).rows():
        spec = row.spec
        cell_folder = folder / 'cells' / spec['folder']
        status, error = row.status, row.error
        try:
            result = read_result(cell_folder)
        except AssetError as damaged:
            result, status, error = None, 'failed', f'error: {damaged}'
        # what lies on disk decides, see `Ledger`
        if result:
            status, error = 'done', ''
        elif status == 'done':
            status = 'pending'
        elif status == 'running' and not locked(cell_folder):
            status = 'interrupted'
        records.append(
            Record(
                name=row.name,
                key=row.key,
                model=spec['model_name'],
                recipe=spec['recipe_name'],
                bits=spec['bits'],
                seed=spec['seed'],
                options=spec['varied'],
                status=status,
                result=result,
                error=error,
                folder=cell_folder,
                seconds=row.seconds,
                host=row.host,
                words=(spec['model'], spec['recipe'], *spec['arguments']),
            )
        )
    return records


def read_result(folder: Path) -> dict[str, Any] | None:
    """Content of the `result.json` of a work dir, None if there is none.

    Raises:
        AssetError: it is damaged.
    """
    path = folder / RESULT
    if not path.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding='utf-8'))
        metrics = result['metrics']
        # what reports rely on
        wanted = (
            (metrics['quant'], dict),
            (metrics['fp'] or {}, dict),
            (result['compat'], list),
            (result['size_mb'], dict),
        )
        if not all(isinstance(value, kind) for value, kind in wanted):
            raise TypeError
    except OSError as error:
        raise AssetError(f'{path}: cannot be read ({error.strerror})') from None
    except (ValueError, KeyError, TypeError):
        raise AssetError(f'{path}: no result of tools/test_quant.py; remove it and run again') from None
    return result
