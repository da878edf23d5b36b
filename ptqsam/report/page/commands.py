"""Commands that make what a page shows, as a reader can type them."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ptqsam.report.grid import option_text
from ptqsam.sweep.records import Record

ROOT = Path(__file__).resolve().parents[3]
MAIN = 'tools/test_quant.py'


def run_command(record: Record, *more: str) -> str:
    """The command that quantizes and evaluates as a run did, as far as its result and its sweep tell.

    Args:
        record: the run.
        more: further arguments.
    """
    return _command(MAIN, record, *more)


def masks_command(record: Record) -> str:
    """The command that draws masks of a run, and leaves its result alone."""
    packed = record.folder / 'packed'
    given = ('--load', str(packed)) if packed.is_dir() else ()
    places = ('--work-dir', str(record.folder / 'again'), '--show-dir', str(record.folder / 'masks'))
    return run_command(record, *given, *places)


def analysis_command(record: Record) -> str:
    """The command that analyses the quantizers of a run."""
    return _command('tools/analyze.py', record, '--work-dir', str(record.folder))


def _command(tool: str, record: Record, *more: str) -> str:
    if record.words:
        return shlex.join(
            ('python', tool, *(record.words if tool == MAIN else without_evaluation(record.words)), *more)
        )
    options: dict[str, list[str]] = {'--quant-options': [], '--cfg-options': []}
    for key, value in record.options.items():
        option = '--cfg-options' if key.startswith('cfg:') else '--quant-options'
        options[option].append(option_text(key.removeprefix('cfg:'), value))
    given = [word for option, values in options.items() if values for word in (option, *values)]
    words = ('python', tool, pipeline_file(record), recipe_file(record), '--seed', str(record.seed))
    return shlex.join((*words, *given, *more))


def without_evaluation(words: Sequence[str]) -> list[str]:
    """Arguments of `tools/test_quant.py` without those about the evaluated images."""
    kept = [word for word in words if word != '--eval-fp']
    if '--limit' in kept:
        place = kept.index('--limit')
        del kept[place : place + 2]
    return kept


def pipeline_file(record: Record) -> str:
    """Where the pipeline of a run lies, or its name if it is none of this project's."""
    return _below(f'configs/*/{record.model}.*') or record.model


def recipe_file(record: Record) -> str:
    """Where the recipe of a run lies, or its name if it is none of this project's."""
    name = str((record.result or {}).get('quant', record.recipe))
    for place, letter in enumerate(name):
        if letter == '_' and (found := _below(f'exp/{name[:place]}/{name[place + 1 :]}.yaml')):
            return found
    return name


def _below(pattern: str) -> str:
    try:
        found = sorted(ROOT.glob(pattern))
    except (ValueError, NotImplementedError):  # a name that is no pattern
        return ''
    return str(found[0].relative_to(ROOT)) if found else ''
