"""Files, disk and memory of a run, for `tools/check_setup.py`; models are built on the meta device."""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.registry import DefaultScope

from ptqsam.check_setup import Row
from ptqsam.checkpoint import float_bytes
from ptqsam.cli import cache_folder, expand_folders, load_model_config, unwrap
from ptqsam.coco_files import ARCHIVES, coco_root
from ptqsam.coco_images import IMAGE_BYTES, choose_images, read_images
from ptqsam.config import QuantConfig, load_quant_config
from ptqsam.config.recipe import Calibration
from ptqsam.download import CHECKPOINTS, fetch_command
from ptqsam.errors import AssetError, ConfigError
from ptqsam.estimate import packed_bytes
from ptqsam.reconstruction.stores import free_device_memory, free_host_memory
from ptqsam.solver.dry_run import copies_counted, decoder_work, encoder_work, forward_memory
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.reconstruction_plan import Plan, plan_reconstruction
from ptqsam.solver.rules import RuleBook
from ptqsam.sources import existing_part, file_size, free_bytes, size_text

# of a box in the cache, as JSON; and how many of an image are kept at most
BOX_BYTES, BOXES_KEPT = 150, 300


@dataclass
class Needs:
    """What the rows of files found out for the rows of the disk.

    Attributes:
        downloads: folder -> bytes that have to be fetched into it.
        unknown: files to be fetched whose size nobody states.
        images: evaluated and calibration images.
    """

    downloads: Counter[Path] = field(default_factory=Counter)
    unknown: Counter[Path] = field(default_factory=Counter)
    images: int = 0


def asset_rows(args: argparse.Namespace) -> list[Row]:
    """Check the files, disk and memory that a run needs.

    Args:
        args: `model_config`, `quant_config` or None, `limit`, `cfg_options`, `quant_options` as `key=value`.

    Raises:
        ConfigError: the config or the recipe is bad.
    """
    expand_folders()
    config = load_model_config(args.model_config, _options(args.cfg_options))
    recipe = load_quant_config(args.quant_config, _options(args.quant_options)) if args.quant_config else None
    needs = Needs()
    with DefaultScope.overwrite_default_scope(config.get('default_scope', 'mmdet')):
        try:
            with torch.device('meta'):
                model = MODELS.build(config.model).eval().requires_grad_(False)
        except (KeyError, TypeError) as error:
            raise ConfigError(f'{args.model_config}: cannot be built ({unwrap(str(error))})') from None
        rows = [_checkpoint_row('SAM checkpoint', model.sam.checkpoint, needs), *_detector_rows(model, needs)]
    rows += _data_rows(config, recipe, args.limit, needs)
    return rows + _cost_rows(model, recipe, needs)


def _options(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` as `tools/test_quant.py` reads them."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='+', action=DictAction, default={})
    options: dict[str, Any] = parser.parse_args(['--options', *words]).options if words else {}
    return options


def _checkpoint_row(what: str, checkpoint: str | None, needs: Needs) -> Row:
    """Whether a checkpoint is there and has the size, or the hash, of the official file of its name."""
    if checkpoint is None:
        return Row('', what, 'none in the config: random weights')
    path, command = Path(checkpoint), fetch_command(checkpoint)
    official = next((known for known in CHECKPOINTS.values() if known.file_name == path.name), None)
    there, part = path.is_file(), file_size(path.with_name(path.name + '.part'))
    problem = official.problem(path, verify=False) if there and official else None
    if there and not problem and file_size(path):
        return Row('ok', what, f'{path} ({size_text(file_size(path))})')
    size = official.size if official else None
    needs.downloads[path.parent] += size - part if size else 0
    needs.unknown[path.parent] += size is None
    if there:
        advice = f'rm {path} && {command}' if command else 'get it again'
        return Row('wrong', what, f'{path}: {problem or "it is empty"}', advice)
    begun = f' ({part:,} bytes of a download are there)' if part else ''
    return Row('missing', what, f'{path}{begun}', command or 'no official source is known; put it there by hand')


def _detector_rows(model: Any, needs: Needs) -> list[Row]:
    """The detector: whether its config can be built, and its weights."""
    detector = model.detector
    if detector.from_annotations:
        return [Row('ok', 'detector', 'true boxes, from the annotations')]
    config, _ = detector.resolve()
    try:
        with torch.device('meta'):
            built = MODELS.build(ConfigDict(config))
    except (KeyError, TypeError, ImportError) as error:
        raise ConfigError(f'model.detector: cannot be built ({unwrap(str(error))})') from None
    size = size_text(float_bytes(built))
    rows = [Row('ok', 'detector', f'{type(built).__name__}, {size} of weights; it is gone before SAM runs')]
    if detector.checkpoint is None:
        return [*rows, Row('missing', 'its checkpoint', 'none', 'set model.detector_checkpoint in the config')]
    return [*rows, _checkpoint_row('its checkpoint', detector.checkpoint, needs)]


def _data_rows(config: Any, recipe: QuantConfig | None, limit: int | None, needs: Needs) -> list[Row]:
    """Annotation files and images of both splits."""
    calibration = recipe.calibration if recipe else Calibration()
    first = recipe.compat.first_images if recipe else False
    parts = dict(evaluate=config.test_dataloader.dataset, calibrate=config.calib_dataset)
    rows, listed = [], {}
    for stage, dataset in parts.items():
        path = Path(dataset.get('data_root') or '', dataset.get('ann_file') or '')
        row, listed[stage] = _annotation_row(f'annotations, {stage}', path, needs)
        rows.append(row)
    chosen: dict[str, list[dict[str, Any]] | None] = {'evaluate': listed['evaluate'], 'calibrate': None}
    problem = None
    if listed['evaluate'] is not None:
        chosen['evaluate'] = listed['evaluate'][:limit]
        if listed['calibrate'] is not None:
            try:
                chosen['calibrate'] = choose_images(
                    listed['calibrate'], listed['evaluate'], limit, calibration.num_images, calibration.seed, first
                ).train
            except ConfigError as error:
                problem = Row('wrong', 'images, calibrate', str(error))
    draw = f'--num-images {calibration.num_images} --seed {calibration.seed}{" --first-images" if first else ""}'
    wanted = dict(evaluate=limit, calibrate=calibration.num_images)
    for stage, dataset in parts.items():
        if stage == 'calibrate' and problem:
            rows.append(problem)
            continue
        folder = Path(dataset.get('data_root') or '', (dataset.get('data_prefix') or {}).get('img') or '')
        command = _images_command(folder, stage, limit, draw)
        rows.append(_images_row(f'images, {stage}', folder, chosen[stage], wanted[stage], command, needs))
    return rows


def _annotation_row(what: str, path: Path, needs: Needs) -> tuple[Row, list[dict[str, Any]] | None]:
    """An annotation file, and its images as far as it can be read."""
    root = path.parent.parent
    command = _make_command(root)
    if _is_coco(root):
        command = f'python tools/download.py coco_annotations{_data_option(root)}'
    advice = command or 'no source is known; put it there by hand'
    if not path.is_file():
        if _is_coco(root):
            archive = ARCHIVES['coco_annotations']
            # one archive has the annotations of both splits
            needs.downloads[root] = max(needs.downloads[root], (archive.size or 0) + archive.unpacked)
        return Row('missing', what, str(path), advice), None
    try:
        images = read_images(path)
    except AssetError as error:
        return Row('wrong', what, str(error), f'rm {path} && {advice}' if command else ''), None
    return Row('ok', what, f'{path} ({len(images):,} images)'), images


def _images_row(
    what: str, folder: Path, images: list[dict[str, Any]] | None, wanted: int | None, command: str, needs: Needs
) -> Row:
    """How many of the images that a stage reads are there."""
    advice = command or 'no source is known; put them there by hand'
    archive = next((archive for archive in ARCHIVES.values() if f' {archive.name}' in command), None)
    if images is None:
        found, present = f'{folder}: {wanted or "all"}, but which is known from the annotations only', 0
        count = wanted or (archive.count if archive else 0)
    else:
        present, count = sum(file_size(folder / image['file_name']) > 0 for image in images), len(images)
        found = f'{folder}: {present:,} of {count:,}'
    needs.images += count
    if images is not None and present == count:
        return Row('ok', what, found)
    if _is_coco(folder.parent):
        size = (archive.size or 0) + archive.unpacked if archive else (count - present) * IMAGE_BYTES
        needs.downloads[folder.parent] += size
    return Row('missing', what, found, advice)


def _images_command(folder: Path, stage: str, limit: int | None, draw: str) -> str:
    """Command that fetches the images of a stage: one by one for calibration or with a limit, else as an archive."""
    root = folder.parent
    if not _is_coco(root):
        return _make_command(root)
    if stage == 'evaluate' and limit is None:
        return f'python tools/download.py coco_val{_data_option(root)}'
    return f'python tools/download.py coco --subset {limit or 0} {draw}{_data_option(root)}'


def _is_coco(root: Path) -> bool:
    """Whether a folder is one that `tools/download.py` can fill."""
    return root.name == 'coco'


def _data_option(root: Path) -> str:
    return '' if root.absolute() == coco_root().absolute() else f' --data {root.parent}'


def _make_command(root: Path) -> str:
    """Command that makes the embedded data set, or ''."""
    if root.name != 'scenes':
        return ''
    default = coco_root().absolute().parent == root.absolute().parent
    return 'python tools/make_scenes.py' + ('' if default else f' --root {root}')


def _cost_rows(model: Any, recipe: QuantConfig | None, needs: Needs) -> list[Row]:
    """Room on the disk, and memory."""
    device = torch.device(get_device())
    weights, packed, plan = float_bytes(model.sam), 0, None
    if recipe is not None:
        rules = RuleBook(recipe)
        with torch.device('meta'):
            quantize_model(model.sam, rules)
        packed = packed_bytes(model.sam)
    with copies_counted(model.sam):
        memory = forward_memory(device, weights, encoder_work(model), decoder_work(model))
        if recipe is not None:
            drawn = recipe.calibration
            plan = plan_reconstruction(model, recipe, [drawn.max_boxes] * drawn.num_images, device)
    return _disk_rows(model, needs, packed, plan) + _memory_rows(device, memory, plan)


def _disk_rows(model: Any, needs: Needs, packed: int, plan: Plan | None) -> list[Row]:
    """What is downloaded and written, against what is free, folder by folder."""
    wanted = []
    for folder, size in needs.downloads.items():
        more = f', and {needs.unknown[folder]} of unknown size' if needs.unknown[folder] else ''
        wanted.append(('disk, downloads', folder, size, more))
    if not model.detector.from_annotations and needs.images:
        wanted.append(('disk, box cache', cache_folder(), needs.images * BOXES_KEPT * BOX_BYTES, ' at most'))
    if packed:
        kept = plan.cache if plan is not None and plan.store == 'disk' else 0
        more = f' (packed {size_text(packed)}{f", activation cache {size_text(kept)}" if kept else ""})'
        wanted.append(('disk, results', Path('work_dirs'), packed + kept, more))
    on_disk: Counter[int] = Counter()
    for _, folder, size, _ in wanted:
        on_disk[_disk(folder)] += size
    rows = []
    for what, folder, size, more in wanted:
        free, needed = free_bytes(folder), on_disk[_disk(folder)]
        together = f' ({size_text(needed)} together with the rest on this disk)' if needed > free >= size else ''
        found = f'{folder}: {size_text(size)}{more}{together}, {size_text(free)} are free'
        advice = 'make room, or choose another folder' if needed > free else ''
        rows.append(Row('full' if advice else 'ok', what, found, advice))
    if plan is not None and plan.problem:
        rows.append(Row('full', 'reconstruction', plan.problem))
    return rows


def _disk(folder: Path) -> int:
    """Number of the disk that a folder is on, or would be."""
    return existing_part(folder).stat().st_dev


def _memory_rows(device: torch.device, memory: int, plan: Plan | None) -> list[Row]:
    """Estimates of `--dry-run` against what the device has."""
    if device.type == 'cuda':
        free, total = free_device_memory(device), torch.cuda.get_device_properties(device).total_memory
    else:
        free, total = free_host_memory(), os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    stages = {'memory, calibrate and evaluate': memory}
    if plan is not None:
        kept = plan.cache if plan.store == 'device' or (device.type, plan.store) == ('cpu', 'host') else 0
        stages['memory, reconstruct'] = memory + kept + plan.peak
    advice = 'lower --cfg-options model.test_cfg.chunk_size or --quant-options calibration.max_boxes'
    rows = []
    for what, size in stages.items():
        found = f'about {size_text(size)}, {device.type} has {size_text(total)}, of which {size_text(free)} are free'
        rows.append(Row('tight', what, found, advice) if size > total else Row('ok', what, found))
    return rows
