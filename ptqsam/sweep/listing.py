"""The cells of a sweep before they are run: what is done, rough time and memory, what is missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.device import get_device

from ptqsam.cli import load_model_config, parse_args
from ptqsam.config import load_quant_config
from ptqsam.errors import AssetError, ConfigError
from ptqsam.estimate import Machine, measure_machine
from ptqsam.fileio import fingerprint
from ptqsam.progress import progress
from ptqsam.report.summary import align
from ptqsam.solver.forecast import forecast_run
from ptqsam.solver.reconstruction_plan import duration
from ptqsam.sweep.cells import Cell
from ptqsam.sweep.ledger import LEDGER, Ledger, Row


@dataclass(frozen=True)
class Estimate:
    """Rough cost of a cell.

    Attributes:
        seconds: without the float model's evaluation; None if images or boxes are not known.
        float_seconds: of the float model's evaluation, which cells of a pipeline share; likewise.
        memory: bytes.
        problems: what is missing or does not fit, one line each.
    """

    seconds: float | None = None
    float_seconds: float | None = None
    memory: int = 0
    problems: tuple[str, ...] = ()


def list_cells(folder: Path, cells: Sequence[Cell], jobs: int) -> str:
    """Describe the cells of a sweep; nothing is run or written.

    Args:
        folder: of the sweep, there or not.
        cells: its cells.
        jobs: cells that run at a time.

    Returns:
        A table for people, a line for what the whole takes, and one for everything that is missing.
    """
    known = known_rows(folder)
    machine = measure_machine(torch.device(get_device()))
    rows: list[tuple[str, ...]] = [('cell', 'state', 'time', 'memory')]
    left, problems, shared = 0.0, dict[str, None](), dict[str, float]()
    unknown = 0
    for cell in progress(cells, 'estimate', 'cell'):
        row = known.get(cell.key)
        state = row.status if row else 'pending'
        if row and row.status == 'done':
            took = '' if row.seconds is None else f'took {duration(row.seconds)}'
            rows.append((cell.name, state, took, ''))
            continue
        one = estimate_cell(cell, machine)
        problems |= dict.fromkeys(one.problems)
        unknown += one.seconds is None
        left += one.seconds or 0
        if '--eval-fp' in cell.arguments and one.float_seconds is not None:
            args = parse_args([cell.model, cell.recipe, *cell.arguments])
            shared[fingerprint([cell.model, args.limit, args.cfg_options])] = one.float_seconds
        time = '?' if one.seconds is None else duration(one.seconds)
        rows.append((cell.name, state, time, f'{one.memory / 1e9:.1f} GB' if one.memory else '?'))
    total = left + sum(shared.values())
    lines = [align(rows), '', f'{len(cells)} cells, {sum(row[1] == "done" for row in rows)} of them done']
    lines.append(
        f'about {duration(total)} of work, {duration(total / jobs)} with {jobs} at a time'
        + (f'; {duration(sum(shared.values()))} of it float evaluation, once per pipeline' if shared else '')
        + (f'; without {unknown} cells whose images or boxes are not known' if unknown else '')
    )
    lines.append('time and memory are rough; starting a cell, the detector and the loading of images come on top')
    return '\n'.join([*lines, *(f'missing: {problem}' for problem in problems)])


def estimate_cell(cell: Cell, machine: Machine) -> Estimate:
    """Rough cost of a cell on a machine; what does not fit together is a problem and no exception."""
    args = parse_args([cell.model, cell.recipe, *cell.arguments])
    overrides = args.quant_options | ({} if args.seed is None else {'calibration.seed': args.seed})
    try:
        run = forecast_run(
            load_model_config(cell.model, args.cfg_options), load_quant_config(cell.recipe, overrides), args.limit
        )
        stages = run.stages(machine)
    except (ConfigError, AssetError) as error:
        return Estimate(problems=(f'{cell.name}: {error}',))
    times = [stage.seconds for stage in stages]
    total = None if None in times else sum(time for time in times if time is not None)
    float_time = next(stage.seconds for stage in stages if stage.name == 'evaluate')
    plan = run.costs.plan
    problems = [*run.problems, *([f'{cell.name}: {plan.problem}'] if plan and plan.problem else [])]
    return Estimate(total, float_time, max(stage.memory for stage in stages), tuple(problems))


def known_rows(folder: Path) -> dict[str, Row]:
    """What the ledger of a folder says, by key; nothing if there is none, or a damaged one."""
    if not (folder / LEDGER).is_file():
        return {}
    try:
        return {row.key: row for row in Ledger(folder).rows()}
    except (AssetError, ConfigError):
        return {}
