"""Kill a sweep of short cells at random moments and see that nothing is lost and nothing computed twice.

`python -m tests.test_sweep.kills FOLDER KILLS SEED CELLS` prints what happened; FOLDER holds a sweep of so many cells,
`grid.yaml`. The test kills less often.
"""

import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.test_sweep.helpers import Stamp, kill, results, start_sweep_tool, tools_of


@dataclass
class Report:
    """What happened.

    Attributes:
        drivers: kills of the driver.
        workers: kills of a process that worked on a cell.
        lost: results that were there and are no longer.
        twice: results that were made again.
        starts: of the driver.
        seconds: from the first start to the end.
        seen: cell -> its result.
    """

    drivers: int = 0
    workers: int = 0
    lost: int = 0
    twice: int = 0
    starts: int = 0
    seconds: float = 0.0
    seen: dict[str, Stamp] = field(default_factory=dict)

    def look(self, folder: Path) -> None:
        """Compare the results that lie there now with those seen before."""
        now = results(folder)
        self.lost += len(set(self.seen) - set(now))
        self.twice += sum(self.seen[cell] != stamp for cell, stamp in now.items() if cell in self.seen)
        self.seen |= now


def kill_at_random(sweep: Path, folder: Path, cells: int, kills: int, seed: int, pause: float) -> Report:
    """Run a sweep to its end while its driver and its workers are killed at random moments.

    Args:
        sweep: YAML of the sweep.
        folder: of the sweep.
        cells: that it has.
        kills: how often; fewer if the sweep ends before.
        seed: of the moments and victims.
        pause: seconds before a kill, at most.
    """
    chance, report, start = random.Random(seed), Report(), time.monotonic()
    driver: subprocess.Popen | None = None
    while len(report.seen) < cells:
        if driver is None or driver.poll() is not None:
            end(driver)
            driver = start_sweep_tool(sweep, '--work-dir', folder, '--jobs', 2, cwd=sweep.parent)
            report.starts += 1
        until = time.monotonic() + chance.uniform(0, pause)
        while time.monotonic() < until and driver.poll() is None and len(report.seen) < cells:
            time.sleep(0.05)
            report.look(folder)
        workers = tools_of(folder)
        if report.drivers + report.workers < kills and driver.poll() is None:
            if chance.random() < 0.5 or not workers:
                kill(driver.pid)
                end(driver)
                driver = None
                report.drivers += 1
            else:
                kill(chance.choice(workers))
                report.workers += 1
        report.look(folder)
    end(driver)
    report.look(folder)
    report.seconds = time.monotonic() - start
    return report


def end(driver: subprocess.Popen | None) -> None:
    """Wait for a driver, if there is one, so that no dead process remains."""
    if driver is not None:
        driver.communicate()


if __name__ == '__main__':
    where, number, first = Path(sys.argv[1]).absolute(), int(sys.argv[2]), int(sys.argv[3])
    print(kill_at_random(where / 'grid.yaml', where / 'sweep', int(sys.argv[4]), number, first, 20.0))
