"""What the ledger costs per cell: `python -m tests.test_sweep.ledger_cost` prints it; no test asserts a time."""

import tempfile
import time
from pathlib import Path

from ptqsam.sweep.ledger import Ledger

CELLS = 36


def cost(folder: Path) -> tuple[float, float]:
    """Milliseconds per cell: of planning and reading, and of an attempt (opening the ledger, its start and its end)."""
    spec = {'folder': 'x' * 60, 'arguments': ['--quant-options', 'calibration.num_images=16']}
    start = time.perf_counter()
    ledger = Ledger(folder)
    ledger.plan([(f'key{number}', f'model/recipe_{number}', spec) for number in range(CELLS)])
    ledger.rows()
    planned = time.perf_counter()
    for number in range(CELLS):
        key, own = f'key{number}', Ledger(folder)
        own.finish(key, own.start(key, 'host', 1), 'done', '', {'quant': {'segm_mAP': 0.5}, 'fp': {'segm_mAP': 0.6}})
    ended = time.perf_counter()
    return (planned - start) / CELLS * 1e3, (ended - planned) / CELLS * 1e3


if __name__ == '__main__':
    with tempfile.TemporaryDirectory(dir='.') as name:
        print('planning {:.2f} ms, an attempt {:.1f} ms per cell'.format(*cost(Path(name))))
