"""The command line of the report (`tools/report.py`)."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from ptqsam.cli import exit_code_of
from ptqsam.errors import AssetError, ConfigError
from ptqsam.fileio import write_text
from ptqsam.report.grid import METRIC, build_grid, metric
from ptqsam.report.grid_text import latex, markdown
from ptqsam.report.page.build import build_page
from ptqsam.report.published import read_published
from ptqsam.sweep.records import RESULT, Record, is_sweep, read_records, read_result


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of a run or a sweep.

    Args:
        argv: command line without the program's name, default `sys.argv`.

    Returns:
        Exit code: 0 done, 2 bad usage or nothing to report, 3 a damaged result or ledger, 130 interrupted.
    """
    args = parse_args(argv)
    return exit_code_of(lambda: run(args), args.verbose, 'report parts of the sweep')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; bad usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog='report.py', description='One HTML page about a run or a sweep, which needs no network and no other file.'
    )
    parser.add_argument('folder', type=Path, help='work dir of a run, or of a sweep')
    parser.add_argument('--output', type=Path, metavar='FILE.html', help='default report.html in the folder')
    parser.add_argument(
        '--markdown', action='store_true', help='print the table as Markdown; the page on --output only'
    )
    parser.add_argument('--latex', action='store_true', help='print the table as LaTeX; the page on --output only')
    parser.add_argument('--verbose', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for.

    Args:
        args: from `parse_args`.

    Returns:
        Exit code 0.

    Raises:
        PTQSAMError: no run or sweep there, a damaged one, or the page cannot be written.
    """
    records, published = read_folder(args.folder), read_published()
    title = title_of(args.folder, records)
    grid = build_grid(records, published)
    if args.markdown:
        print(markdown(grid))
    if args.latex:
        print(latex(grid, title))
    if args.output is None and (args.markdown or args.latex):
        return 0
    output = args.output or args.folder / 'report.html'
    if output.is_dir():
        raise ConfigError(f'--output {output}: is a folder; name a file in it')
    sweep = args.folder / 'sweep.yaml'
    sources = [(sweep.name, sweep.read_text(encoding='utf-8', errors='replace'))] if sweep.is_file() else []
    command = shlex.join(['python', 'tools/report.py', *sys.argv[1:]])
    page = build_page(title, records, published, command, sources)
    write_text(output, page)
    print(f'{output}: {len(records)} run{"" if len(records) == 1 else "s"}, {len(page.encode()) / 1e6:.1f} MB')
    return 0


def title_of(folder: Path, records: list[Record]) -> str:
    """The name of a run, or the title of a sweep, else the name of its folder."""
    if not is_sweep(folder):
        return records[0].name
    try:
        content = yaml.safe_load((folder / 'sweep.yaml').read_text(encoding='utf-8'))
        title = content.get('title')
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        title = ''
    return str(title or folder.resolve().name)


def read_folder(folder: Path) -> list[Record]:
    """The runs of a folder.

    Args:
        folder: work dir of `tools/test_quant.py`, or of `tools/sweep.py`.

    Returns:
        The run, or the cells of the sweep; at least one.

    Raises:
        ConfigError: there is neither, or the sweep has no cell.
        AssetError: a damaged result or ledger.
    """
    if not folder.is_dir():
        raise ConfigError(f'{folder}: no such folder; name the work dir of a run or of a sweep')
    if is_sweep(folder):
        if not (records := read_records(folder)):
            raise ConfigError(f'{folder}: the sweep has no cells yet; start it first')
        return records
    if (result := read_result(folder)) is None:
        raise ConfigError(f'{folder}: no finished run ({RESULT}) and no sweep in it; name the work dir of one')
    return [single_run(folder, result)]


def single_run(folder: Path, result: dict) -> Record:
    """The record of a run that is no cell of a sweep.

    Args:
        folder: its work dir.
        result: content of its `result.json`.

    Raises:
        AssetError: it lacks what every result has.
    """
    try:
        record = Record(
            name=f'{result["model"]}/{result["quant"]}',
            key='',
            model=result['model'],
            recipe=recipe_of(result['quant']),
            bits=result['bits'],
            seed=result['seed'],
            options={},
            status='done',
            result=result,
            error='',
            folder=folder,
            seconds=sum(result['seconds'].values()),
            host='',
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise AssetError(
            f'{folder / RESULT}: lacks what a result has ({type(error).__name__}: {error}); remove it and run again'
        ) from None
    if metric(record, 'quant') is None:
        raise AssetError(f'{folder / RESULT}: has no {METRIC} of the quantized model; remove it and run again')
    return record


def recipe_of(quant: str) -> str:
    """Name of a recipe without bits: `mse_w4a4` is `mse`, whatever bits the run was given."""
    return re.sub(r'(?<=.)_w\d+a\d+$', '', quant)
