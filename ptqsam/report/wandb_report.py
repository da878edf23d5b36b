"""Report to Weights & Biases: one run per run of the loop. Offline unless asked otherwise."""

import functools
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from ptqsam.errors import ConfigError, PTQSAMError
from ptqsam.reconstruction.engine import read_outcomes
from ptqsam.registry import SOLVER_HOOKS
from ptqsam.report.wandb_content import (
    RANK,
    SERIES,
    STAGE,
    STAGES,
    config_of,
    curve_points,
    metrics_of,
    pictures_of,
    plots_of,
    read_table,
    sqnr_points,
    summary_of,
    unit_curves,
)

if TYPE_CHECKING:
    from mmengine.runner import Runner

MODES = ('online', 'offline', 'disabled')
# where wandb keeps copies of what it uploads and its logs, by default in the home folder
FOLDERS = ('WANDB_DATA_DIR', 'WANDB_CACHE_DIR')


def reporting(method: 'Callable[[WandbReport, Runner], None]') -> 'Callable[[WandbReport, Runner], None]':
    """Do nothing without a run; should wandb's process be gone, go on without it: a report is not worth a result."""

    @functools.wraps(method)
    def report(self: 'WandbReport', runner: 'Runner') -> None:
        if self.run is None:
            return
        try:
            method(self, runner)
        except (ConnectionError, import_wandb().errors.Error) as error:
            runner.logger.warning(f'WandbReport: wandb is lost, the run goes on without it ({error})')
            self.run = None
            with suppress(ConnectionError):
                self._close(1)

    return report


@SOLVER_HOOKS.register_module()
class WandbReport(Hook):
    """One wandb run for one run of the loop; its files lie in `<work dir>/wandb`.

    What is reported is what the run left in its work dir, so that the two never disagree: a resumed run reports what
    an earlier one has done as well, and so replaces it. wandb itself is imported when the run starts and not before.

    Args:
        project: wandb project.
        name: name of the run, default model and recipe.
        group: group of runs, for example a sweep.
        tags: tags of the run, a text with commas or a list.
        id: id of the run, which replaces an earlier run with this id; default a new one.
        mode: 'online', 'offline' or 'disabled'; default the environment variable WANDB_MODE, else 'online' for an
            agent of a wandb sweep, else 'offline'.
    """

    priority = 'VERY_LOW'

    def __init__(
        self,
        project: str = 'ptqsam',
        name: str | None = None,
        group: str | None = None,
        tags: str | Sequence[str] = (),
        id: str | None = None,
        mode: str | None = None,
    ) -> None:
        usual = 'online' if 'WANDB_SWEEP_ID' in os.environ else 'offline'
        self.mode = mode or os.environ.get('WANDB_MODE') or usual
        words = tags.split(',') if isinstance(tags, str) else list(tags)
        self.labels: dict[str, Any] = dict(project=project, name=name, group=group, id=id, tags=words)
        self.run: Any = None
        self._own_folders: list[str] = []
        self._plots: set[str] = set()

    def before_load(self, runner: 'Runner') -> None:
        """Start the run.

        Raises:
            ConfigError: unknown mode; wandb is not installed, not logged in or refuses to start.
        """
        if not is_main_process():
            return
        if self.mode not in MODES:
            raise ConfigError(f'WandbReport: mode (or WANDB_MODE) is {self.mode!r}; use one of {", ".join(MODES)}')
        wandb = import_wandb()
        loop: Any = runner.test_loop
        options = loop.options
        folder = Path(loop.work_dir).resolve()
        (folder / 'wandb').mkdir(parents=True, exist_ok=True)
        self._own_folders = [name for name in FOLDERS if name not in os.environ]
        os.environ |= {name: str(folder / 'wandb') for name in self._own_folders}
        self._plots.clear()
        try:
            with no_questions():
                self.run = wandb.init(
                    **self.labels | dict(name=self.labels['name'] or f'{options.model} {options.quant}'),
                    config=config_of(options.model, options.quant, options.seed, loop.recipe.plain()),
                    mode=self.mode,
                    dir=str(folder),
                    # a run that the caller has open is none of ours
                    reinit='create_new',
                    # stdout belongs to the result
                    settings=wandb.Settings(silent=True, console='off'),
                )
        except (wandb.errors.Error, ValueError) as error:
            self._close(1)
            raise ConfigError(
                f'WandbReport: wandb does not start in mode {self.mode!r} ({" ".join(str(error).split())})'
            ) from None
        if self.mode != 'disabled' and self.labels['id'] is not None:
            remove_earlier(folder / 'wandb', Path(self.run.settings.sync_dir), self.run.id)
        for prefix, (axis, summary) in SERIES.items():
            self.run.define_metric(axis, hidden=True)
            self.run.define_metric(f'{prefix}/*', step_metric=axis, summary=summary)

    @reporting
    def after_load(self, runner: 'Runner') -> None:
        """Log time and memory."""
        self._end_stage(runner, 'load')

    @reporting
    def after_evaluate_fp(self, runner: 'Runner') -> None:
        """Log metrics of the float model."""
        loop: Any = runner.test_loop
        self._end_stage(runner, 'evaluate_fp', metrics_of(loop.metrics))

    @reporting
    def after_prepare(self, runner: 'Runner') -> None:
        """Log time and memory."""
        self._end_stage(runner, 'prepare')

    @reporting
    def after_calibrate(self, runner: 'Runner') -> None:
        """Log pictures of what calibration found."""
        self._end_stage(runner, 'calibrate')

    @reporting
    def after_reconstruct(self, runner: 'Runner') -> None:
        """Log what reconstruction did to each unit; its loss curves have the iteration as their axis."""
        self._end_stage(runner, 'reconstruct')
        self._log_units(runner)

    @reporting
    def after_freeze(self, runner: 'Runner') -> None:
        """Log time and memory."""
        self._end_stage(runner, 'freeze')

    @reporting
    def after_evaluate(self, runner: 'Runner') -> None:
        """Log metrics of the quantized model, its size, and the error of each quantizer."""
        loop: Any = runner.test_loop
        bits = loop.recipe.plain()['bits']
        values = metrics_of(loop.metrics) | {f'size_mb/{name}': size for name, size in loop.size_mb.items()}
        # in one row with the metrics, so that these can be drawn over bits
        values |= {f'bits/{kind}': bits[kind] for kind in ('weight', 'act')}
        self._end_stage(runner, 'evaluate', values)
        for point in sqnr_points(loop.rules.enabled, loop.errors):
            self.run.log(point)

    @reporting
    def after_report(self, runner: 'Runner') -> None:
        """Log what the run left in its work dir, and close the run."""
        wandb = import_wandb()
        loop: Any = runner.test_loop
        folder = Path(loop.work_dir)
        if 'reconstruct' not in loop.seconds and (folder / 'reconstruction.csv').is_file():
            self._log_units(runner)  # the run went on from an earlier one
        columns, rows = read_table(folder / 'summary.csv')
        self._end_stage(runner, 'report', dict(quantizers=wandb.Table(columns=columns, data=rows)))
        for rank, (file, caption) in enumerate(pictures_of(loop.gallery), 1):
            # by rank to look at the worst ones, by name to compare runs picture by picture
            names = ('pictures/ranked', f'pictures/{file.stem}')
            self.run.log({RANK: rank} | {name: wandb.Image(str(file), caption=caption) for name in names})
        self.run.summary.update(summary_of(loop.result))
        place = self.run.settings.sync_dir
        self._close(0)
        if self.mode == 'offline':
            runner.logger.info(f'wandb: to upload this run, `wandb sync {place}`')

    @reporting
    def after_failure(self, runner: 'Runner') -> None:
        """Close the run as failed, with what went wrong in its summary."""
        error = sys.exception()
        text = ' '.join(str(error).split())
        if not isinstance(error, PTQSAMError):
            text = f'{type(error).__name__}: {text}'.removesuffix(': ')
        self.run.summary['error'] = text
        self._close(1)

    def _end_stage(self, runner: 'Runner', stage: str, more: Mapping[str, Any] | None = None) -> None:
        """Log the time of a stage, the largest memory use so far, new plots in the work dir, and more."""
        wandb = import_wandb()
        loop: Any = runner.test_loop
        seconds = loop.seconds[stage]
        row = {STAGE: STAGES.index(stage) + 1, 'stage/seconds': seconds, f'seconds/{stage}': seconds}
        row['stage/memory_mb'] = loop.memory_mb[stage]
        plots = {name: file for name, file in plots_of(Path(loop.work_dir)).items() if name not in self._plots}
        self._plots |= set(plots)
        self.run.log(row | {name: wandb.Image(str(file)) for name, file in plots.items()} | dict(more or {}))

    def _log_units(self, runner: 'Runner') -> None:
        """Log the table and the loss curves of reconstructed units."""
        loop: Any = runner.test_loop
        folder = Path(loop.work_dir)
        columns, rows = read_table(folder / 'reconstruction.csv')
        self.run.log(dict(units=import_wandb().Table(columns=columns, data=rows)))
        outcomes = loop.outcomes or read_outcomes(folder / 'reconstruction')
        for point in curve_points(unit_curves(outcomes)):
            self.run.log(point)

    def _close(self, exit_code: int) -> None:
        """Finish the run and end wandb's background process, unless somebody else uses it."""
        wandb = import_wandb()
        try:
            if self.run is not None:
                self.run.finish(exit_code=exit_code)
            if wandb.run is None:
                wandb.teardown()
        finally:
            self.run = None
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


@contextmanager
def no_questions() -> Iterator[None]:
    """Let wandb find no terminal: without a login it would ask there for one, and a long run would wait for ever."""
    with open(os.devnull, encoding='utf-8') as nothing:
        stdin, sys.stdin = sys.stdin, nothing
        try:
            yield
        finally:
            sys.stdin = stdin


def remove_earlier(folder: Path, own: Path, run_id: str) -> None:
    """Remove earlier offline runs with the id of a new one, which wandb would upload one over the other.

    wandb cannot resume offline: there each run is a folder of its own, whatever its id.

    Args:
        folder: where runs lie.
        own: folder of the new run.
        run_id: id of the new run.
    """
    for earlier in folder.glob('offline-run-*'):
        if (earlier / f'run-{run_id}.wandb').is_file() and earlier.resolve() != own.resolve():
            shutil.rmtree(earlier)
