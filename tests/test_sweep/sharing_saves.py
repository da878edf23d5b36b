"""Time of a sweep against that of its cells alone, on a quiet machine.

`python -m tests.test_sweep.sharing_saves FOLDER [--sweep YAML] [--jobs N]` runs the sweep with an empty cache, then
each of its cells by `tools/test_quant.py` without shared work, as many at a time and with as many threads, and compares
all results.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ptqsam.sweep.cells import Cell, expand
from ptqsam.sweep.spec import load_sweep

# parts of a result that a run without shared work has in common with the sweep's cell
SAME = ('metrics', 'size_mb', 'quantized')


def measured(what: str, work: Callable[[], None]) -> tuple[float, float]:
    """Wall time of some work and CPU time of the processes that it starts; seconds, and printed."""
    start, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    wall, now = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    print(f'{what}: {wall:.0f} s, {cpu:.0f} CPU s', flush=True)
    return wall, cpu


def tool(name: str, words: list[str], cache: Path, threads: int) -> None:
    """Run a tool quietly with a cache of its own."""
    env = dict(PTQSAM_CACHE=str(cache), OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    command = [sys.executable, f'tools/{name}.py', *words]
    subprocess.run(command, check=True, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def different(cell: Cell, one: Path, other: Path) -> list[str]:
    """What is not equal in two work dirs of a cell: parts of the result, files of the packed checkpoint."""
    results = [json.loads((folder / 'result.json').read_text()) for folder in (one, other)]
    parts = [name for name in SAME if results[0][name] != results[1][name]]
    files = sorted(path.name for path in (one / 'packed').glob('*.safetensors'))
    parts += [name for name in files if (one / 'packed' / name).read_bytes() != (other / 'packed' / name).read_bytes()]
    return [f'{cell.name}: {part}' for part in parts] + ([] if files else [f'{cell.name}: nothing packed'])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--sweep', default='exp/sweeps/demo_smoke.yaml')
    parser.add_argument('--jobs', type=int, default=2)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f'{args.folder} exists; the measurement needs a new folder')
    spec = load_sweep(args.sweep, {})
    cells, threads = expand(spec, args.sweep), spec.resources.threads

    def together() -> None:
        words = [args.sweep, '--work-dir', str(args.folder / 'sweep'), '--jobs', str(args.jobs)]
        tool('sweep', words, args.folder / 'cache', threads)

    def alone() -> None:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, cells))

    def one(cell: Cell) -> None:
        folder = args.folder / 'alone' / cell.folder
        tool('test_quant', cell.words(folder), folder / 'cache', threads)

    sweep = measured(f'sweep of {len(cells)} cells', together)
    cells_alone = measured('its cells alone', alone)
    saved = [1 - mine / theirs for mine, theirs in zip(sweep, cells_alone, strict=True)]
    print(f'saved: {saved[0]:.0%} of the time, {saved[1]:.0%} of the CPU time')
    folders = [(cell, args.folder / 'sweep/cells' / cell.folder, args.folder / 'alone' / cell.folder) for cell in cells]
    unequal = [line for folder in folders for line in different(*folder)]
    print('\n'.join(unequal) or 'all results are equal')
    return bool(unequal)


if __name__ == '__main__':
    sys.exit(main())
