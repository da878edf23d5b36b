"""The command line of sweeps (`tools/sweep.py`, `ptqsam-sweep`)."""

import argparse
import fnmatch
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import DictAction

from ptqsam.cli import check_writable, exit_code_of, expand_folders, parse_words
from ptqsam.errors import ConfigError
from ptqsam.fileio import write_text
from ptqsam.report.grid import build_grid
from ptqsam.report.grid_text import markdown
from ptqsam.report.wandb_report import import_wandb
from ptqsam.report.wandb_sweep import run_options, sweep_definition, sync_command
from ptqsam.sweep.cells import Cell, expand, written
from ptqsam.sweep.driver import Engine, Summary, make_job, plan, run_sweep
from ptqsam.sweep.ledger import noted
from ptqsam.sweep.listing import list_cells
from ptqsam.sweep.local_engine import run_local, visible_gpus
from ptqsam.sweep.ray_engine import run_ray
from ptqsam.sweep.records import read_records
from ptqsam.sweep.run_cell import run_cell
from ptqsam.sweep.spec import Resources, SweepSpec, load_sweep

FAILED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep.

    Args:
        argv: command line without the program's name, default `sys.argv`.

    Returns:
        Exit code: 0 all cells are done, 1 some failed, 2 bad usage or sweep, 130 interrupted.
    """
    args = parse_args(argv)
    return exit_code_of(
        lambda: run(args),
        args.verbose,
        'run fewer cells at a time with --jobs',
        'interrupted; start the same command again to go on',
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; bad usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog='ptqsam-sweep',
        description='Run a grid of pipelines, recipes, bits and seeds. Start it again to go on: what is done stays.',
    )
    parser.add_argument('sweep', help='YAML of the sweep (exp/sweeps/...)')
    parser.add_argument('--work-dir', type=Path, help='folder of the sweep, default work_dirs/sweeps/NAME')
    parser.add_argument('--engine', choices=['local', 'ray', 'wandb'], default='local', help='default local')
    parser.add_argument('--jobs', type=int, metavar='N', help='cells at a time; default one per GPU, or as cores allow')
    parser.add_argument('--ray-address', metavar='ADDR', help='Ray cluster, auto or host:port; default: this machine')
    parser.add_argument('--only', nargs='+', metavar='GLOB', default=['*'], help='only cells with such names')
    for option, what in (
        ('--axes', 'values of axes in place of those of the sweep, as bits=[w4a4,w6a6] seed=0'),
        ('--quant-options', 'override the recipes of all cells'),
        ('--cfg-options', 'override the pipelines of all cells'),
    ):
        parser.add_argument(option, nargs='+', action=DictAction, default={}, metavar='K=V', help=what)
    parser.add_argument('--limit', type=int, metavar='N', help='evaluate only the first N images in all cells')
    parser.add_argument('--retry-failed', action='store_true', help='also cells that failed; others stay failed')
    parser.add_argument('--wandb', metavar='PROJECT', help='report to this W&B project')
    parser.add_argument('--dry-run', action='store_true', help='list the cells with rough time and memory, and stop')
    parser.add_argument('--cell', metavar='NAME', help='run this one here, as an agent of --engine wandb does')
    parser.add_argument('--verbose', action='store_true', help='show the traceback of an error')
    args = parse_words(parser, argv)
    for name in ('jobs', 'limit'):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f'--{name} must be at least 1')
    if args.ray_address and args.engine != 'ray':
        parser.error('--ray-address needs --engine ray')
    if args.ray_address and args.jobs:
        parser.error('--jobs does not go with --ray-address: resources of the cluster and of a cell decide')
    return args


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for.

    Args:
        args: from `parse_args`.

    Returns:
        Exit code 0, 1 or 130.

    Raises:
        PTQSAMError: anything that the user can cause or cure.
    """
    expand_folders()
    spec = load_sweep(args.sweep, overrides(args))
    cells = expand(spec, args.sweep, narrowed=bool(args.axes))
    chosen = choose(cells, [args.cell] if args.cell else args.only)
    folder = args.work_dir or Path('work_dirs/sweeps') / Path(args.sweep).stem
    jobs = args.jobs or default_jobs(spec.resources)
    if args.dry_run:
        print(list_cells(folder, chosen, jobs))
        return 0
    check_writable(folder, '--work-dir')
    project = args.wandb or spec.wandb
    if args.engine == 'wandb':
        return write_wandb_sweep(args, chosen, folder, project)
    if project:
        import_wandb()  # or every cell would find out by itself
    rows = {row.key: row for row in plan(folder, cells)}
    write_text(folder / 'sweep.yaml', yaml.safe_dump(spec.model_dump(), sort_keys=False))
    todo = [make_job(cell, folder, spec.resources, further_words(cell, folder, project)) for cell in chosen]
    if args.cell:
        outcome = run_cell(todo[0], {}, wait=True)
        print(outcome.error or outcome.status, file=sys.stderr)
        return {'done': 0, 'interrupted': INTERRUPTED}.get(outcome.status, FAILED)
    engine = choose_engine(args, spec, jobs)
    summary = run_sweep(todo, [rows[job.key] for job in todo], engine, args.retry_failed)
    if records := noted(lambda: read_records(folder)):
        print(markdown(build_grid(records, [])))
    if command := sync_command(folder):
        print(f'wandb: to upload the runs, `{command}`')
    return tell(summary, folder)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line puts in place of parts of the sweep."""
    given = dict(quant=args.quant_options, cfg=args.cfg_options, limit=args.limit)
    return dict(axes=args.axes, run={name: value for name, value in given.items() if value})


def choose(cells: Sequence[Cell], globs: Sequence[str]) -> list[Cell]:
    """The cells whose names match a glob.

    Raises:
        ConfigError: a glob matches none.
    """
    for glob in globs:
        if not any(fnmatch.fnmatchcase(cell.name, glob) for cell in cells):
            raise ConfigError(f"no cell is called '{glob}'; there are {', '.join(cell.name for cell in cells)}")
    return [cell for cell in cells if any(fnmatch.fnmatchcase(cell.name, glob) for glob in globs)]


def gpus_of(resources: Resources) -> int:
    """GPUs of a cell: what the sweep says, else one for each process where there are any."""
    if resources.gpus is not None:
        return resources.gpus
    return resources.processes if visible_gpus() else 0


def default_jobs(resources: Resources) -> int:
    """Cells at a time: as many as there are GPUs for, or cores and memory."""
    if gpus := gpus_of(resources):
        return max(1, len(visible_gpus()) // gpus)
    limits = [len(os.sched_getaffinity(0)) // (resources.threads * resources.processes)]
    if resources.memory_gb is not None:
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9
        limits.append(int(memory / resources.memory_gb))
    return max(1, min(limits))


def choose_engine(args: argparse.Namespace, spec: SweepSpec, jobs: int) -> Engine:
    """What runs the cells."""
    gpus = gpus_of(spec.resources)
    if args.engine == 'ray':
        return lambda todo, stop: run_ray(todo, spec.resources, gpus, args.ray_address, args.jobs, stop)
    if gpus > (there := len(visible_gpus())):
        raise ConfigError(
            f'resources.gpus: a cell takes {gpus}, this machine has {there}; lower it, or use --engine ray'
        )
    return lambda todo, stop: run_local(todo, jobs, gpus, stop)


def further_words(cell: Cell, folder: Path, project: str | None) -> list[str]:
    """Words of a cell's command that do not change its result."""
    reported = ['--wandb', project, *run_options(folder.name, cell.name, cell.key)] if project else []
    return ['--share-work', *reported]


def write_wandb_sweep(args: argparse.Namespace, cells: Sequence[Cell], folder: Path, project: str | None) -> int:
    """Write the cells as a sweep of W&B, whose agents call this tool with `--cell`.

    Raises:
        ConfigError: no project is named.
    """
    if not project:
        raise ConfigError('--engine wandb: no project; give --wandb PROJECT, or name one in the sweep')
    words = ['tools/sweep.py', args.sweep, '--work-dir', str(folder), '--wandb', project]
    for option in ('axes', 'quant_options', 'cfg_options'):
        if values := getattr(args, option):
            words += [f'--{option.replace("_", "-")}', *(f'{key}={written(value)}' for key, value in values.items())]
    words += ['--limit', str(args.limit)] if args.limit else []
    path = folder / 'wandb-sweep.yaml'
    definition = sweep_definition([cell.name for cell in cells], words, project, folder.name)
    write_text(path, yaml.safe_dump(definition, sort_keys=False))
    print(f'{path}: {len(cells)} cells; `wandb sweep {path}` registers it and says how agents are started')
    return 0


def tell(summary: Summary, folder: Path) -> int:
    """Print how a sweep ended.

    Returns:
        Exit code.
    """
    print(f'{len(summary.computed)} cells computed, {summary.found} found done; in {folder}')
    for what, cells in (('failed', summary.failed), ('interrupted', summary.interrupted)):
        if cells:
            print(f'{what}: {len(cells)}', file=sys.stderr)
            for name, error in cells.items():
                print(f'  {name}: {error}', file=sys.stderr)
    if summary.waiting:
        print(f'not begun: {summary.waiting}', file=sys.stderr)
    if summary.interrupted or summary.waiting:
        print('start the same command again to go on', file=sys.stderr)
    if summary.failed:
        print('start it again with --retry-failed to try what failed once more', file=sys.stderr)
    if summary.stopped:
        return INTERRUPTED
    return FAILED if summary.failed or summary.interrupted else 0
