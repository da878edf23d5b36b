"""The hardware report of a packed checkpoint (`tools/hardware_report.py`): from the command line to files.

`hardware.csv` has a row per product, `hardware.json` the same, sums and claims. With `--permute` also
`permutations.safetensors`: key = path of a grouped quantizer, value = the channel at each place, (C,) int64
(`ptqsam.permutation`); how it gets there is in hardware.json, `permutations`, where without the option stands what it
would do (`permuted` tells which).
"""

import argparse
import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmdet.registry import MODELS
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from safetensors.torch import save_file
from torch import Tensor, nn

from ptqsam.checkpoint import load_packed, read_manifest
from ptqsam.cli import (
    cache_folder,
    check_writable,
    exit_code_of,
    expand_folders,
    load_model_config,
    parse_words,
    unwrap,
)
from ptqsam.errors import AssetError, ConfigError, GateError
from ptqsam.fileio import atomic_path, write_json, write_text
from ptqsam.hardware import measure_products
from ptqsam.hardware_summary import compare_claims, report_text, summarize, totals
from ptqsam.permutation import Permuted, channel_permutations, make_groups_contiguous, plan_permutations
from ptqsam.report.summary import run_label
from ptqsam.solver.datasets import build_dataset
from ptqsam.solver.freeze import check_gate

PERMUTATIONS = 'permutations.safetensors'


def main(argv: Sequence[str] | None = None) -> int:
    """Report what hardware needs for a packed checkpoint.

    Args:
        argv: command line without the program's name, default `sys.argv`.

    Returns:
        Exit code: 0 done, 2 bad usage or config, 3 missing or bad data or checkpoint, 4 a product in integer
        arithmetic is not that of the fake-quantized tensors, 130 interrupted.
    """
    args = parse_args(argv)
    return exit_code_of(lambda: run(args), args.verbose, 'lower model.test_cfg.chunk_size with --cfg-options')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; bad usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog='hardware_report.py',
        description='Per product of a packed model: engine, registers, tables, traffic, MACs; each executed once in '
        'integer arithmetic and compared. Writes hardware.csv and hardware.json.',
    )
    parser.add_argument('model_config', help='pipeline that the checkpoint was made with (configs/...)')
    parser.add_argument('packed', type=Path, metavar='PACKED_DIR', help='packed checkpoint, WORK_DIR/packed of a run')
    parser.add_argument('--work-dir', type=Path, help='results go here, default beside PACKED_DIR')
    parser.add_argument('--images', type=int, default=1, help='run it on the first N evaluated images; default 1')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='override the pipeline, k=v')
    parser.add_argument(
        '--permute',
        action='store_true',
        help=f'make groups of channels contiguous first, write {PERMUTATIONS}: key = path of the quantizer, value = '
        'channel at each place; how it gets there (absorbed by the layer before, gather, or none) is in hardware.json',
    )
    parser.add_argument('--verbose', action='store_true', help='show the traceback of an error')
    args = parse_words(parser, argv)
    if args.images < 1:
        parser.error('--images must be at least 1')
    return args


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for.

    Args:
        args: from `parse_args`.

    Returns:
        Exit code 0.

    Raises:
        PTQSAMError: anything that the user can cause or cure; `GateError` for a wrong product.
    """
    expand_folders()
    config = load_model_config(args.model_config, args.cfg_options)
    if args.packed.is_file():
        raise AssetError(f'{args.packed}: is a file; name its folder')
    read_manifest(args.packed)  # before anything that takes long
    work_dir = args.work_dir or args.packed.resolve().parent
    with gone_if_empty(work_dir):
        check_writable(work_dir, '--work-dir')
        return make_report(args, config, work_dir)


def make_report(args: argparse.Namespace, config: Config, work_dir: Path) -> int:
    """Load, measure, write and print.

    Args:
        args: from `parse_args`.
        config: model config.
        work_dir: results go here.
    """
    with building(args.model_config, config):
        model = MODELS.build(config.model).eval().requires_grad_(False).to(get_device())
    manifest, rules = load_packed(args.packed, model.sam)
    check_gate(model.sam, rules.enabled)
    orders, permutations = permute(model.sam) if args.permute else ({}, plan_permutations(model.sam))
    with building(args.model_config, config):
        loader = build_loader(config, model, args.images)
    roles = {choice.point.path: choice.point.role for choice in rules.choices}
    products = measure_products(model, model.sam, loader, roles)
    images, recipe, bits = len(loader.dataset), manifest['recipe'], rules.config.bits.resolved()
    rows = [product.row(images) for product in products]
    report = dict(
        packed=str(args.packed),
        model=Path(args.model_config).stem,
        algorithm=recipe['algorithm'],
        bits=bits,
        label=run_label(recipe['algorithm'], bits, rules.bit_counts()),
        images=images,
        boxes=sum(model.count_boxes(loader.dataset, cache_folder()) or []),
        totals=totals(rows),
        claims=compare_claims(products, rows, permutations, args.permute),
        permuted=args.permute,
        permutations={path: permuted.plain() for path, permuted in permutations.items()},
        sums=summarize(rows),
        products=rows,
    )
    write_results(work_dir, report, orders)
    print(f'\n{report_text(report)}\n')
    print(f'in {work_dir}: hardware.csv, hardware.json' + f', {PERMUTATIONS}' * args.permute)
    names = ('packed', 'model', 'algorithm', 'bits', 'images', 'boxes', 'totals', 'claims')
    print(json.dumps({name: report[name] for name in names}))
    if wrong := [row for row in rows if row['agrees'] is False]:
        raise GateError(
            f'{len(wrong)} of {len(rows)} products differ in integer arithmetic from the fake-quantized ones; '
            f'{wrong[0]["path"]} by {wrong[0]["error"]:.1e} of its largest value'
        )
    return 0


@contextmanager
def gone_if_empty(folder: Path) -> Iterator[None]:
    """Take a folder for results away again, with those made for it, if nothing got into it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it is not empty, or was never made
                path.rmdir()


@contextmanager
def building(path: str, config: Config) -> Iterator[None]:
    """Build parts of a pipeline.

    Raises:
        ConfigError: mmengine cannot.
    """
    try:
        with DefaultScope.overwrite_default_scope(config.get('default_scope', 'mmdet')):
            yield
    except (KeyError, TypeError) as error:
        raise ConfigError(f'{path}: cannot be built ({unwrap(str(error))})') from None


def build_loader(config: Config, model: Any, images: int) -> Any:
    """Loader of the first evaluated images with prompt boxes.

    Args:
        config: model config.
        model: of this pipeline; its detector runs where boxes are not known yet.
        images: how many images, fewer if there are fewer.
    """
    dataset = build_dataset(config.test_dataloader.dataset)
    dataset.get_subset_(list(range(min(images, len(dataset)))))
    model.attach_boxes(dataset, cache_folder())
    return Runner.build_dataloader(dict(config.test_dataloader, dataset=dataset, batch_size=1, num_workers=0))


def permute(sam: nn.Module) -> tuple[dict[str, Tensor], dict[str, Permuted]]:
    """Make groups contiguous; returns the orders, and what became of each path."""
    orders = channel_permutations(sam)
    if not orders:
        raise ConfigError('--permute: no quantizer of this model groups channels; use a recipe with CAG')
    return orders, make_groups_contiguous(sam)


def write_results(work_dir: Path, report: dict[str, Any], orders: dict[str, Tensor]) -> None:
    """Write the files; the orders last, so that they never lie beside the report of another model.

    Args:
        work_dir: where to.
        report: content of hardware.json.
        orders: of channels; without them a file of an earlier report goes.
    """
    (work_dir / PERMUTATIONS).unlink(missing_ok=True)
    write_csv(work_dir / 'hardware.csv', report['products'])
    write_json(work_dir / 'hardware.json', report)
    if orders:
        with atomic_path(work_dir / PERMUTATIONS) as temporary:
            save_file({path: order.cpu().contiguous() for path, order in orders.items()}, temporary)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one row per product."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())
