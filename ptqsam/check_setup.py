"""Whether everything is there that a run needs: `tools/check_setup.py`.

Packages come first, by the versions that are installed: importing those that do not fit ends in a traceback.
"""

import argparse
import importlib
import importlib.metadata
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ptqsam.errors import AssetError

# package -> the first version that works, and the first that is known, or by its number allowed, to break us (setup.py)
RANGES = {
    'torch': ('2.6', '3'),
    'torchvision': ('0.21', ''),
    'numpy': ('2.0', '3'),
    'mmengine': ('0.10.7', '1'),
    'mmcv': ('2.1', '2.2'),
    'mmdet': ('3.3', '3.4'),
    'segment-anything': ('1.0', '2'),
    'timm': ('1.0', '2'),
    'pycocotools': ('2.0.8', ''),
}
# maintained forks under the same import names, with versions of their own
FORKS = {'mmengine': 'onedl-mmengine', 'mmcv': 'onedl-mmcv', 'mmdet': 'onedl-mmdetection'}
OPERATORS = ('nms', 'roi_align_forward', 'ms_deform_attn_forward')
INSTALL = 'make setup'


@dataclass(frozen=True)
class Row:
    """One thing that a run needs.

    Attributes:
        state: 'ok', 'missing', 'wrong', 'full' (no room on the disk), 'tight' (little memory), or '' (only told).
        what: the thing.
        found: where it is looked for, what there is.
        advice: command or words that cure it, where it is not ok.
    """

    state: str
    what: str
    found: str
    advice: str = ''

    @property
    def stops(self) -> bool:
        """Whether a run cannot succeed."""
        return self.state in ('missing', 'wrong', 'full')


def package_rows() -> list[Row]:
    """Versions of the packages that have broken each other before, and mmcv's compiled operators."""
    rows = [_package_row(name, *versions) for name, versions in RANGES.items()]
    good = [row for row in rows if not row.stops]
    rows = [row for row in rows if row.stops]
    if good:
        rows.insert(0, Row('ok', 'packages', ', '.join(f'{row.what} {row.found}' for row in good)))
    return rows if any(row.stops for row in rows) else [*rows, _operators_row()]


def _package_row(name: str, least: str, below: str) -> Row:
    for distribution in (name, FORKS.get(name, name)):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        fits = _number(least) <= _number(version) and (not below or _number(version) < _number(below))
        if fits or distribution != name:
            return Row('ok', name, version)
        limit = f' and below {below}' if below else ''
        return Row('wrong', name, f'version {version}; {least} or newer{limit} is needed', INSTALL)
    return Row('missing', name, 'not installed', INSTALL)


def _number(version: str) -> tuple[int, ...]:
    """Comparable form of a version, without local parts such as '+cu128'."""
    return tuple(int(part) for part in re.findall(r'\d+', version.partition('+')[0])[:3])


def _operators_row() -> Row:
    """Whether mmcv's own operators can be loaded: a wheel for another torch has them, but they do not load."""
    what = 'mmcv operators'
    advice = f"{INSTALL}, or pip install --no-build-isolation 'mmcv>=2.1,<2.2' after torch"
    try:
        torch = importlib.import_module('torch')
        operators = importlib.import_module('mmcv._ext')
    except ImportError as error:
        return Row('missing', what, f'cannot be loaded ({" ".join(str(error).split())})', advice)
    if absent := [name for name in OPERATORS if not hasattr(operators, name)]:
        return Row('missing', what, f'without {", ".join(absent)}', advice)
    if torch.cuda.is_available() and operators.get_compiling_cuda_version() == 'not available':
        return Row('wrong', what, 'compiled without CUDA, but there is a GPU', advice)
    return Row('ok', what, 'compiled')


def table(rows: Sequence[Row]) -> str:
    """Rows for people: state, thing, what there is; below it what to do."""
    width = max(len(row.what) for row in rows)
    lines = []
    for row in rows:
        # a path is never broken, whatever its length
        parts = textwrap.wrap(row.found, 100, break_long_words=False, break_on_hyphens=False) or ['']
        parts += [f'-> {row.advice}'] if row.advice else []
        lines.append(f'{row.state:<8} {row.what:<{width}}  {parts[0]}'.rstrip())
        lines += [f'{"":<8} {"":<{width}}  {part}' for part in parts[1:]]
    return '\n'.join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; bad usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog='check_setup.py', description='Say what a run needs, what of it is missing, and how to get it.'
    )
    parser.add_argument('model_config', help='pipeline (configs/...)')
    parser.add_argument('quant_config', nargs='?', help='recipe (exp/...); without: 32 calibration images, seed 0')
    parser.add_argument('--limit', type=int, metavar='N', help='of a run that evaluates only the first N images')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='K=V', help='as for tools/test_quant.py')
    parser.add_argument('--quant-options', nargs='+', default=[], metavar='K=V', help='as for tools/test_quant.py')
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error('--limit must be at least 1')
    if args.quant_options and not args.quant_config:
        parser.error('--quant-options needs a recipe')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Check a setup and print what was found.

    Args:
        argv: command line without the program's name, default `sys.argv`.

    Returns:
        Exit code: 0 complete, 2 bad usage or config, 3 something is missing or wrong.
    """
    args = parse_args(argv)
    rows = package_rows()
    if any(row.stops for row in rows):
        print(table(rows))
        print('the rest cannot be checked without these packages', file=sys.stderr)
        return AssetError.exit_code
    # needs the packages
    from ptqsam.check_assets import asset_rows
    from ptqsam.cli import exit_code_of

    def tool() -> int:
        found = [*rows, *asset_rows(args)]
        print(table(found))
        stops = [row for row in found if row.stops]
        recipe = f' with {Path(args.quant_config)}' if args.quant_config else ''
        problems = f'{len(stops)} problem{"s" * (len(stops) > 1)}, see above'
        print(f'\n{Path(args.model_config)}{recipe}: {problems if stops else "complete"}')
        return AssetError.exit_code if stops else 0

    return exit_code_of(tool, False, 'end other programs; this one needs little')
