"""The command line of the analysis (`tools/analyze.py`): which quantizer costs what, and why."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mmengine.config import DictAction

from ptqsam.analysis.analysis import Analysis
from ptqsam.checkpoint import MANIFEST, read_manifest
from ptqsam.cli import (
    cache_folder,
    check_writable,
    exit_code_of,
    expand_folders,
    load_model_config,
    parse_words,
    recipe_name,
)
from ptqsam.config import QuantConfig, load_quant_config
from ptqsam.errors import ConfigError
from ptqsam.hardware_report import gone_if_empty

PARTS = ('sensitivity', 'statistics')


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse the quantizers of a recipe.

    Args:
        argv: command line without the program's name, default `sys.argv`.

    Returns:
        Exit code: 0 done, 2 bad usage or config, 3 missing or bad data or checkpoint, 4 numbers that are not finite,
        130 interrupted.
    """
    args = parse_args(argv)
    return exit_code_of(
        lambda: run(args),
        args.verbose,
        'lower calibration.max_boxes with --quant-options, or ask for fewer --images',
        'interrupted; run again with the same arguments to go on',
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; bad usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog='analyze.py',
        description='Which quantizer of a recipe costs what, and why: SQNR of mask logits and IoU of masks with one '
        'quantizer alone on and alone off, statistics of activations and weights, histograms; on calibration images.',
    )
    parser.add_argument('model_config', help='pipeline: detector, SAM, data (configs/...)')
    parser.add_argument('quant_config', help='recipe (exp/...)')
    parser.add_argument(
        '--load', type=Path, metavar='DIR', help='packed checkpoint of the recipe, default WORK_DIR/packed if it exists'
    )
    parser.add_argument(
        '--work-dir', type=Path, help='results go to its folder analysis/, default work_dirs/MODEL/RECIPE'
    )
    parser.add_argument('--images', type=int, default=2, help='calibration images to look at, default 2')
    parser.add_argument(
        '--bits', type=int, nargs='+', default=[], help="alone on also at these bits, 2 to 8; default only the recipe's"
    )
    parser.add_argument(
        '--points', nargs='+', default=[], metavar='GLOB', help='only quantizers whose path, or role:ROLE, matches'
    )
    parser.add_argument('--what', nargs='+', default=PARTS, choices=PARTS, help='default both')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='override the pipeline, k=v')
    parser.add_argument('--quant-options', nargs='+', action=DictAction, default={}, help='override the recipe, k=v')
    parser.add_argument('--seed', type=int, help="seed of calibration images and boxes, default the recipe's")
    parser.add_argument('--verbose', action='store_true', help='show the traceback of an error')
    return parse_words(parser, argv)


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for.

    Args:
        args: from `parse_args`.

    Returns:
        Exit code 0.

    Raises:
        PTQSAMError: anything that the user can cause or cure.
    """
    if args.images < 1:
        raise ConfigError(f'--images {args.images}: must be at least 1')
    if wrong := [bits for bits in args.bits if not 2 <= bits <= 8]:
        raise ConfigError(f'--bits {wrong[0]}: quantizers have 2 to 8 bits')
    expand_folders()
    overrides = dict(args.quant_options)
    if args.seed is not None:
        overrides['calibration.seed'] = args.seed
    recipe = load_quant_config(args.quant_config, overrides)
    load_model_config(args.model_config, args.cfg_options)  # before anything that takes long
    work_dir = args.work_dir or Path('work_dirs') / Path(args.model_config).stem / recipe_name(args.quant_config)
    packed = choose_packed(args.load, work_dir / 'packed', recipe)
    folder = work_dir / 'analysis'
    with gone_if_empty(folder), TemporaryDirectory() as temporary:
        check_writable(folder, '--work-dir')
        check_writable(cache_folder(), 'PTQSAM_CACHE')
        analysis = Analysis(args, recipe, packed, folder, Path(temporary))
        summary = analysis.run()
    print(f'\n{analysis.text()}\n')
    print(f'{args.images} calibration images; in {folder}: {", ".join(analysis.files())}')
    print(json.dumps(summary))
    return 0


def choose_packed(given: Path | None, usual: Path, recipe: QuantConfig) -> Path | None:
    """The packed checkpoint to analyse; None: the recipe is calibrated.

    Args:
        given: what `--load` names.
        usual: where a run would have left one.
        recipe: checked recipe.

    Raises:
        AssetError: missing or damaged.
        ConfigError: the recipe learns, and there is none.
    """
    packed = given if given is not None else usual if (usual / MANIFEST).is_file() else None
    if packed is not None:
        read_manifest(packed)
    elif recipe.reconstruction is not None:
        raise ConfigError(
            f'{usual}: no packed checkpoint, and this recipe learns: run tools/test_quant.py with it first, name a '
            'checkpoint with --load, or analyse its ranges alone with --quant-options reconstruction=None'
        )
    return packed
