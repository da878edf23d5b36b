"""Report to Weights & Biases: config, metrics, table of quantizers, pictures. Offline unless asked otherwise."""

import csv
import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from ptqsam.errors import ConfigError
from ptqsam.registry import SOLVER_HOOKS
from ptqsam.report.reconstruction import COLUMNS as OUTCOME_COLUMNS
from ptqsam.report.reconstruction import point_ends, relative_losses, shortened

if TYPE_CHECKING:
    from mmengine.runner import Runner

MAX_PICTURES = 16
# columns of tables; axis of the loss curves
NUMBERS = ('sqnr_db', 'cosine', *OUTCOME_COLUMNS[1:])
ITERATION = 'reconstruction/iteration'
MODES = ('online', 'offline', 'disabled')
# where wandb keeps copies of what it uploads and its logs, by default in the home folder
FOLDERS = ('WANDB_DATA_DIR', 'WANDB_CACHE_DIR')


@SOLVER_HOOKS.register_module()
class WandbReport(Hook):
    """One wandb run for one run of the loop; its files lie in `<work dir>/wandb`.

    What is reported is what the run left in its work dir, so that the two never disagree. wandb itself is imported
    when the run starts and not before.

    Args:
        project: wandb project.
        name: name of the run, default model and recipe.
        group: group of runs, for example a sweep.
        tags: tags of the run.
        mode: 'online', 'offline' or 'disabled'; default the environment variable WANDB_MODE, else 'offline'.
    """

    priority = 'VERY_LOW'

    def __init__(
        self,
        project: str = 'ptqsam',
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: str | None = None,
    ) -> None:
        self.mode = mode or os.environ.get('WANDB_MODE') or 'offline'
        self.name = name
        self.labels: dict[str, Any] = dict(project=project, group=group, tags=list(tags))
        self.run: Any = None
        self._own_folders: list[str] = []

    def before_prepare(self, runner: 'Runner') -> None:
        """Start the run.

        Raises:
            ConfigError: unknown mode; wandb is not installed or refuses to start.
        """
        if not is_main_process():
            return
        if self.mode not in MODES:
            raise ConfigError(f'WandbReport: mode (or WANDB_MODE) is {self.mode!r}; use one of {", ".join(MODES)}')
        wandb = import_wandb()
        loop: Any = runner.test_loop
        options = loop.options
        config = dict(model=options.model, quant=options.quant, seed=options.seed, **loop.recipe.plain())
        folder = Path(loop.work_dir).resolve()
        (folder / 'wandb').mkdir(parents=True, exist_ok=True)
        self._own_folders = [name for name in FOLDERS if name not in os.environ]
        os.environ |= {name: str(folder / 'wandb') for name in self._own_folders}
        try:
            self.run = wandb.init(
                **self.labels,
                name=self.name or f'{options.model} {options.quant}',
                config=config,
                mode=self.mode,
                dir=str(folder),
                # a run that the caller has open is none of ours
                reinit='create_new',
                # stdout belongs to the result
                settings=wandb.Settings(silent=True, console='off'),
            )
        except wandb.errors.Error as error:
            self._close(1)
            reason = ' '.join(str(error).split())
            raise ConfigError(f'WandbReport: wandb does not start in mode {self.mode!r} ({reason})') from None

    def after_reconstruct(self, runner: 'Runner') -> None:
        """Log what reconstruction did to each unit; its loss curves have the iteration as their axis."""
        if self.run is None:
            return
        wandb = import_wandb()
        loop: Any = runner.test_loop
        folder = Path(loop.work_dir)
        columns, rows = read_table(folder / 'reconstruction.csv')
        media: dict[str, Any] = {'units': wandb.Table(columns=columns, data=rows)}
        if (plot := folder / 'reconstruction.png').is_file():
            media['reconstruction'] = wandb.Image(str(plot))
        self.run.log(media)
        self.run.define_metric(ITERATION, hidden=True)
        self.run.define_metric('unit_loss/*', step_metric=ITERATION)
        curves = {f'unit_loss/{unit}': relative_losses(outcome) for unit, outcome in loop.outcomes.items()}
        for values in curve_points(curves):
            self.run.log(values)

    def after_report(self, runner: 'Runner') -> None:
        """Log what the run left in its work dir, and close the run."""
        if self.run is None:
            return
        wandb = import_wandb()
        loop: Any = runner.test_loop
        folder = Path(loop.work_dir)
        columns, rows = read_table(folder / 'summary.csv')
        media: dict[str, Any] = {'quantizers': wandb.Table(columns=columns, data=rows)}
        if (plot := folder / 'sqnr.png').is_file():
            media['sqnr'] = wandb.Image(str(plot))
        # one name per image, so that runs can be compared picture by picture
        pictures = loop.gallery.pictures[:MAX_PICTURES] if loop.gallery else []
        media |= {f'pictures/{file.stem}': wandb.Image(str(file)) for file in pictures}
        self.run.log(media)
        self.run.summary.update(summary_of(loop.result))
        place = self.run.settings.sync_dir
        self._close(0)
        if self.mode == 'offline':
            runner.logger.info(f'wandb: to upload this run, `wandb sync {place}`')

    def after_failure(self, runner: 'Runner') -> None:
        """Close the run as failed."""
        if self.run is not None:
            self._close(1)

    def _close(self, exit_code: int) -> None:
        """Finish the run and end wandb's background process, unless somebody else uses it."""
        wandb = import_wandb()
        if self.run is not None:
            self.run.finish(exit_code=exit_code)
            self.run = None
        if wandb.run is None:
            wandb.teardown()
        for name in self._own_folders:
            os.environ.pop(name, None)
        self._own_folders = []


def import_wandb() -> Any:
    """The module wandb.

    Raises:
        ConfigError: not installed.
    """
    try:
        return importlib.import_module('wandb')
    except ImportError:
        raise ConfigError("WandbReport needs wandb, which is not installed: pip install 'ptqsam[wandb]'") from None


def summary_of(result: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a run under names for a dashboard: `fp/segm_mAP`, `quant/segm_mAP`, `size_mb/packed`, ...

    Args:
        result: content of `result.json`.

    Returns:
        Flat dict; 'drop/<metric>' is what quantization cost, where the float model was evaluated.
    """
    fp, quant = result['metrics']['fp'] or {}, result['metrics']['quant']
    groups = dict(fp=fp, quant=quant, size_mb=result['size_mb'], seconds=result['seconds'])
    groups['drop'] = {name: value - quant[name] for name, value in fp.items()}
    flat = {f'{group}/{name}': value for group, values in groups.items() for name, value in values.items()}
    return flat | {name: result[name] for name in ('peak_memory_mb', 'compat', 'images')}


def curve_points(curves: Mapping[str, np.ndarray]) -> Iterator[dict[str, float]]:
    """What to log for curves over iterations, shortened to means of some of them.

    Args:
        curves: name -> values; parts may have learned for different numbers of iterations.

    Yields:
        `ITERATION`, ascending, and the values of the curves with a point that stands for iterations up to this one.
    """
    points: dict[int, dict[str, float]] = {}
    for name, curve in curves.items():
        for end, value in zip(point_ends(len(curve)), shortened(curve), strict=True):
            points.setdefault(end, {})[name] = float(value)
    for end in sorted(points):
        yield {ITERATION: end} | points[end]


def read_table(path: Path) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of `summary.csv` or `reconstruction.csv` with numbers as numbers.

    Args:
        path: the CSV file.

    Returns:
        Names of the columns, and rows. Empty cells and infinity are None, JSON has neither; an exact quantizer still
        differs from one that was not measured by its cosine of 1.
    """
    with open(path, encoding='utf-8', newline='') as file:
        columns, *rows = csv.reader(file)
    convert: dict[str, Callable[[str], Any]] = {'bits': int} | dict.fromkeys(NUMBERS, _number)
    return columns, [[convert.get(name, str)(cell) for name, cell in zip(columns, row, strict=True)] for row in rows]


def _number(cell: str) -> float | None:
    value = float(cell or 'nan')
    return value if math.isfinite(value) else None
