"""Mixed precision from the command line (`tools/allocate_bits.py`): a table of losses and budgets in, a recipe out."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.logging import MMLogger

from ptqsam.cli import cache_folder, check_writable, exit_code_of, expand_folders, load_model_config, parse_words
from ptqsam.config import QuantConfig, load_quant_config
from ptqsam.errors import ConfigError
from ptqsam.estimate import packed_bytes
from ptqsam.fileio import write_json, write_text
from ptqsam.hardware_report import building
from ptqsam.mixed.allocate import allocate
from ptqsam.mixed.mix_qsam import LEAST, Importance, measure_importance, quadratic_programme, read_importance
from ptqsam.mixed.plan import Plan, bounded_kinds, list_options, make_budgets, uniform_loss
from ptqsam.mixed.products import Product, count_products
from ptqsam.mixed.recipe import recipe_text
from ptqsam.mixed.report import plot_bits, summary_table
from ptqsam.mixed.sensitivity import check_sensitivity, read_sensitivity
from ptqsam.solver.datasets import build_calib_loader, build_dataset, image_names
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from ptqsam.yaml_files import yaml_chain

# Mix-QSAM's at a target of 4 bits
CANDIDATES = [2, 3, 4, 5, 6]


def main(argv: Sequence[str] | None = None) -> int:
    """Choose bits and write a recipe.

    Args:
        argv: command line without the program's name, default `sys.argv`.

    Returns:
        Exit code: 0 done, 2 bad usage, config or budget, 3 missing or bad table, data or checkpoint, 130 interrupted.
    """
    args = parse_args(argv)
    args.command = shlex.join(sys.argv[1:] if argv is None else map(str, argv))
    return exit_code_of(lambda: run(args), args.verbose, 'lower --images, or model.test_cfg.chunk_size')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; bad usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog='allocate_bits.py',
        description='Choose bits layer by layer so that the predicted loss is least under a budget; write a recipe.',
    )
    parser.add_argument('model_config', help='pipeline (configs/...)')
    parser.add_argument('quant_config', help='recipe to start from (exp/...); what no budget bounds keeps its bits')
    parser.add_argument('--output', type=Path, required=True, metavar='YAML', help='the recipe to write')
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--sensitivity', type=Path, metavar='CSV', help='table of tools/analyze.py')
    source.add_argument('--method', choices=['mix_qsam'], help='measure importance and synergy of layers instead')
    parser.add_argument(
        '--loss',
        choices=['noise', 'iou'],
        help="of a quantizer: power of the mask logits' error over that of the logits (default), or 1 - IoU of masks",
    )
    parser.add_argument('--size-mb', type=amount, metavar='MB|wN', help='of packed weights, or as with N bits')
    parser.add_argument('--bitops', type=amount, metavar='G|wNaM', help='10^9 per image, or as with these bits')
    parser.add_argument('--average-bits', type=positive, metavar='N', help='per weight and per activation value')
    parser.add_argument('--candidates', type=int, nargs='+', help='default those of the table; mix_qsam: 2 3 4 5 6')
    parser.add_argument(
        '--boxes', type=int, help="prompt boxes of the image that budgets are for, default the recipe's max_boxes"
    )
    parser.add_argument('--images', type=int, help='mix_qsam: calibration images to measure on; default 4')
    parser.add_argument('--importance', type=Path, metavar='JSON', help='mix_qsam: importances of an earlier call')
    parser.add_argument('--work-dir', type=Path, help='picture and importances go here, default work_dirs/mixed/NAME')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='override the pipeline, k=v')
    parser.add_argument('--verbose', action='store_true', help='show the traceback of an error')
    args = parse_words(parser, argv)
    if args.size_mb is None and args.bitops is None and args.average_bits is None:
        parser.error('give a budget: --size-mb, --bitops or --average-bits')
    if args.output.suffix not in ('.yaml', '.yml'):
        parser.error('--output must be a YAML file')
    if wrong := [bits for bits in args.candidates or () if not 2 <= bits <= 8]:
        parser.error(f'--candidates: {wrong[0]} is not a bit width from 2 to 8')
    if args.method and args.average_bits is not None:
        parser.error('--average-bits is for --sensitivity; mix_qsam has budgets of --size-mb and --bitops')
    if args.method and args.loss:
        parser.error('--loss is for --sensitivity')
    if not args.method and (args.images is not None or args.importance):
        parser.error('--images and --importance are for --method mix_qsam')
    args.images, args.loss = 4 if args.images is None else args.images, args.loss or 'noise'
    if args.images < 1 or (args.boxes is not None and args.boxes < 1):
        parser.error('--images and --boxes must be at least 1')
    return args


def amount(text: str) -> float | dict[str, int]:
    """An amount, or the bits of a uniform model: `w4`, `w4a8`."""
    if match := re.fullmatch(r'w([2-8])(?:a([2-8]))?', text.lower()):
        return dict(weight=int(match[1]), act=int(match[2] or match[1]))
    return positive(text)


def positive(text: str) -> float:
    """A number above 0; anything else is a ValueError, of which argparse makes a message."""
    value = float(text)
    if not 0 < value < float('inf'):
        raise ValueError
    return value


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for.

    Args:
        args: from `parse_args`.

    Returns:
        Exit code 0.

    Raises:
        PTQSAMError: anything that the user can cause or cure.
    """
    expand_folders()
    args.candidates = sorted(set(args.candidates or (CANDIDATES if args.method else ())))
    recipe = load_quant_config(args.quant_config, {'calibration.num_images': args.images} if args.method else {})
    if args.output.resolve() in yaml_chain(Path(args.quant_config).resolve()):
        raise ConfigError(f'--output {args.output}: {args.quant_config} is made of this file; choose another name')
    config = load_model_config(args.model_config, args.cfg_options)
    work_dir = args.work_dir or Path('work_dirs') / 'mixed' / args.output.stem
    for folder, option in ((work_dir, '--work-dir'), (args.output.parent, '--output')):
        check_writable(folder, option)
    model, rules = build_model(args, config, recipe, 'meta')
    products = count_products(model, rules.enabled, args.boxes or recipe.calibration.max_boxes)
    if args.method:
        plan = plan_by_importance(args, products, find_importance(args, config, recipe, products, work_dir))
    else:
        plan = plan_by_sensitivity(args, products)
    rest = packed_bytes(model.sam) - sum(f.packed_bytes(f.bits) for product in products for f in product.factors)
    table = summary_table(plan, args.candidates, rest)
    title = f'{plan.proof} under {plan.budget_text}'
    made = f'Bits of {Path(args.model_config).stem}: {title}. Made by: python tools/allocate_bits.py {args.command}'
    comment = [*wrap(made, 100, break_long_words=False, break_on_hyphens=False), *table.splitlines()]
    text = recipe_text(args.output, Path(args.quant_config), recipe, rules.choices, plan.bits, comment)
    write_text(args.output, text)
    plot_bits(work_dir / 'bits.png', plan, f'{args.output.stem}: {title}')
    print(f'{table}\n\n{title}\n{args.output}; in {work_dir}: bits.png{", importance.json" * bool(args.method)}')
    return 0


def build_model(args: argparse.Namespace, config: Config, recipe: QuantConfig, device: str) -> tuple[Any, RuleBook]:
    """The pipeline's model with quantizers, all off.

    Args:
        args: from `parse_args`.
        config: model config.
        recipe: checked recipe.
        device: on the meta device it has no weights.

    Raises:
        ConfigError: it cannot be built, or the recipe does not fit it.
    """
    rules = RuleBook(recipe)
    with building(args.model_config, config), torch.device(device):
        model = MODELS.build(config.model).eval().requires_grad_(False)
        if device != 'meta':
            model.init_weights()
        quantize_model(model.sam, rules)
    return model, rules


def plan_by_sensitivity(args: argparse.Namespace, products: list[Product]) -> Plan:
    """Least sum of the losses that quantizers cause alone."""
    table = read_sensitivity(args.sensitivity, args.loss)
    args.candidates = args.candidates or table.common_bits(args.sensitivity)
    budgets = make_budgets(products, args.size_mb, args.bitops, args.average_bits)
    options = list_options(products, args.candidates, bounded_kinds(budgets))
    needed = {path: bits for option in options for path, bits in option.needed.items()}
    check_sensitivity(args.sensitivity, table, needed)
    units = [option.unit(table.loss) for option in options]
    losses = {f'W{bits}A{bits}': uniform_loss(products, table.loss, bits) for bits in args.candidates}
    return Plan(budgets, options, allocate(units, budgets), losses)


def plan_by_importance(args: argparse.Namespace, products: list[Product], importance: Importance) -> Plan:
    """Mix-QSAM's bits."""
    budgets = make_budgets(products, args.size_mb, args.bitops, None, LEAST)
    options = list_options(products, args.candidates, {'weight', 'act'}, equal=True)
    units, couplings = quadratic_programme(options, importance)
    return Plan(budgets, options, allocate(units, budgets, couplings))


def find_importance(
    args: argparse.Namespace, config: Config, recipe: QuantConfig, products: list[Product], work_dir: Path
) -> Importance:
    """Importances of an earlier call, or measured on calibration images and written to `importance.json`."""
    paths = [product.path for product in products]
    if args.importance is not None:
        return read_importance(args.importance, paths)
    calibration = recipe.calibration
    model, _ = build_model(args, config, recipe, 'cpu')
    model.to(get_device())
    with building(args.model_config, config):
        evaluated = image_names(build_dataset(config.test_dataloader.dataset))
        loader = build_calib_loader(config.calib_dataset, recipe, evaluated, 0, MMLogger.get_current_instance())
        model.attach_boxes(loader.dataset, cache_folder())
    importance = measure_importance(model, model.sam, loader, paths, calibration.max_boxes, calibration.seed)
    write_json(work_dir / 'importance.json', importance)
    return importance
