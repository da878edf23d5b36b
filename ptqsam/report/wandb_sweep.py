"""The cells of a sweep as runs on Weights & Biases, and as a sweep that wandb's own agents work through."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptqsam.errors import ConfigError
from ptqsam.fileio import fingerprint


def run_options(sweep: str, cell: str, key: str, tags: Sequence[str] = ()) -> list[str]:
    """Words for `tools/test_quant.py --wandb PROJECT`, so that a cell is one run however often it is tried.

    Args:
        sweep: name of the sweep, the run's group.
        cell: name of the cell, the run's name.
        key: fingerprint of what the cell computes; another key is another run.
        tags: of the run.
    """
    # the same cell in two sweeps is two runs: a run has one group
    words = [f'group={sweep}', f'name={cell}', f'id={fingerprint([sweep, key])}']
    return ['--wandb-options', *words, *([f'tags={",".join(tags)}'] if tags else [])]


def sync_command(folder: Path) -> str:
    """Shell command that uploads the offline runs of a sweep; '' if there are none.

    Args:
        folder: of the sweep.
    """
    runs = folder.glob('cells/**/wandb/offline-run-*')
    # a shell has no pattern for any depth; names of cells have slashes
    depths = sorted({len(run.relative_to(folder / 'cells').parts) - 2 for run in runs})
    patterns = [f'{shlex.quote(str(folder))}/cells/{"*/" * depth}wandb/offline-run-*' for depth in depths]
    return ' '.join(['wandb', 'sync', *patterns]) if patterns else ''


def sweep_definition(cells: Sequence[str], command: Sequence[str], project: str, name: str) -> dict[str, Any]:
    """A sweep for `wandb sweep FILE.yaml`, whose agents (`wandb agent`) run one cell after the other.

    Args:
        cells: their names.
        command: what runs a cell, without the option that names it: `['tools/sweep.py', 'exp/sweeps/demo_smoke.yaml']`;
            a Python script and its options, as they are called in the folder that the agent is started in.
        project: wandb project.
        name: of the sweep.

    Returns:
        The definition, https://docs.wandb.ai/models/sweeps/sweep-config-keys: a grid over one parameter, `cell`.

    Raises:
        ConfigError: a word of the command, or a name of a cell, that wandb would not hand on as it is.
    """
    program, *options = command
    if macros := [word for word in (*command, *cells) if '${' in word]:
        raise ConfigError(f"{macros[0]}: '${{' would be replaced by an agent of wandb; rename it")
    return dict(
        name=name,
        project=project,
        method='grid',
        program=program,
        parameters=dict(cell=dict(values=list(cells))),
        command=['${env}', '${interpreter}', '${program}', *options, '${args_no_equals}'],
    )
