"""Files, disk and memory of a run, for `tools/check_setup.py`; models are built on the meta device."""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.config import ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.registry import DefaultScope, Registry

from ptqsam.check_setup import Row
from ptqsam.checkpoint import float_bytes
from ptqsam.cli import cache_folder, expand_folders, load_model_config, unwrap
from ptqsam.coco_files import ARCHIVES, Archive, coco_root, data_option, is_coco
from ptqsam.coco_images import IMAGE_BYTES, choose_images, read_images
from ptqsam.config import QuantConfig, load_quant_config
from ptqsam.config.recipe import Calibration
from ptqsam.download import copy_beside, fetch_command, official
from ptqsam.errors import AssetError, ConfigError
from ptqsam.reconstruction.stores import free_device_memory, free_host_memory
from ptqsam.solver.forecast import Costs, decoder_work, encoder_work, estimate_costs, forward_memory, kept_by_hooks
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
        ConfigError: the config or the recipe is bad, or the one does not suit the other.
    """
    expand_folders()
    config = load_model_config(args.model_config, _options(args.cfg_options))
    recipe = load_quant_config(args.quant_config, _options(args.quant_options)) if args.quant_config else None
    needs = Needs()
    with DefaultScope.overwrite_default_scope(config.get('default_scope', 'mmdet')):
        model = _build(MODELS, config.model, args.model_config).eval().requires_grad_(False)
        rows = [_checkpoint_row('SAM checkpoint', model.sam.checkpoint, needs), *_detector_rows(model, config, needs)]
    rows += _data_rows(config, recipe, args.limit, needs)
    return rows + _cost_rows(model, recipe, needs)


def _build(registry: Registry, config: Any, what: str) -> Any:
    """Build something without memory for its weights, or say that its config does not allow it."""
    try:
        with torch.device('meta'):
            return registry.build(config)
    except (KeyError, TypeError, ImportError) as error:
        raise ConfigError(f'{what}: cannot be built ({unwrap(str(error))})') from None


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
    path, command, known = Path(checkpoint), fetch_command(checkpoint), official(checkpoint)
    there, part = path.is_file(), file_size(path.with_name(path.name + '.part'))
    problem = known.problem(path, verify=False) if there and known else None
    if there and not problem and file_size(path):
        unsure = ', hash not published' if known and not known.sha256 else ''
        return Row('ok', what, f'{path} ({size_text(file_size(path))}{unsure})')
    if not there and (copy := copy_beside(path)):
        return Row('missing', what, f'{path}, but {copy.name} lies there', f'ln -s {copy.name} {path}')
    size = known.size if known else None
    needs.downloads[path.parent] += size - part if size else 0
    needs.unknown[path.parent] += size is None
    if there:
        advice = f'rm {path} && {command}' if command else 'get it again'
        return Row('wrong', what, f'{path}: {problem or "it is empty"}', advice)
    begun = f' ({part:,} bytes of a download are there)' if part else ''
    return Row('missing', what, f'{path}{begun}', command or 'no official source is known; put it there by hand')


def _detector_rows(model: Any, config: Any, needs: Needs) -> list[Row]:
    """The detector: whether its config can be built, its classes and its weights."""
    detector = model.detector
    if detector.from_annotations:
        return [Row('ok', 'detector', 'true boxes, from the annotations')]
    built = _build(MODELS, ConfigDict(detector.resolve()[0]), 'model.detector')
    size = size_text(float_bytes(built))
    rows = [Row('ok', 'detector', f'{type(built).__name__}, {size} of weights; it is gone before SAM runs')]
    known = detector.num_classes()
    for stage, dataset in _datasets(config).items():
        # without its files
        classes = len(_build(DATASETS, {**dataset, 'lazy_init': True}, f'the data to {stage}').metainfo['classes'])
        if known not in (None, classes):
            found = f'of the detector, {known}, are not those of the data, {classes}'
            advice = 'use a detector that was trained for these data, or OracleDetector'
            rows.append(Row('wrong', f'classes, {stage}', found, advice))
    if detector.checkpoint is None:
        return [*rows, Row('missing', 'its checkpoint', 'none', 'set model.detector_checkpoint in the config')]
    return [*rows, _checkpoint_row('its checkpoint', detector.checkpoint, needs)]


def _datasets(config: Any) -> dict[str, Any]:
    """Stage -> config of its images."""
    return dict(evaluate=config.test_dataloader.dataset, calibrate=config.calib_dataset)


def _data_rows(config: Any, recipe: QuantConfig | None, limit: int | None, needs: Needs) -> list[Row]:
    """Annotation files and images of both splits."""
    calibration = recipe.calibration if recipe else Calibration()
    first = recipe.compat.first_images if recipe else False
    parts = _datasets(config)
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
        whole = (stage, limit) == ('evaluate', None)
        source = ARCHIVES['coco_val'] if whole else f'coco --subset {limit or 0} {draw}'
        rows.append(_images_row(f'images, {stage}', folder, chosen[stage], wanted[stage], source, needs))
    return rows


def _annotation_row(what: str, path: Path, needs: Needs) -> tuple[Row, list[dict[str, Any]] | None]:
    """An annotation file, and its images as far as it can be read."""
    root = path.parent.parent
    command = _fetch_or_make(root, 'coco_annotations')
    advice = command or 'no source is known; put it there by hand'
    if not path.is_file():
        if is_coco(root):
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
    what: str,
    folder: Path,
    images: list[dict[str, Any]] | None,
    wanted: int | None,
    source: Archive | str,
    needs: Needs,
) -> Row:
    """How many of the images that a stage reads are there; of COCO they come as an archive, or one by one."""
    coco = is_coco(folder.parent)
    archive = source if coco and isinstance(source, Archive) else None
    words = source.name if isinstance(source, Archive) else source
    advice = _fetch_or_make(folder.parent, words) or 'no source is known; put them there by hand'
    if images is None:
        found, present = f'{folder}: {wanted or "all"}, but which is known from the annotations only', 0
        count = wanted or (archive.count if archive else 0)
    else:
        present, count = sum(file_size(folder / image['file_name']) > 0 for image in images), len(images)
        found = f'{folder}: {present:,} of {count:,}'
    needs.images += count
    if images is not None and present == count:
        return Row('ok', what, found)
    if coco:
        size = (archive.size or 0) + archive.unpacked if archive else (count - present) * IMAGE_BYTES
        needs.downloads[folder.parent] += size
    return Row('missing', what, found, advice)


def _fetch_or_make(root: Path, words: str) -> str:
    """Command that fetches something of COCO, in the words of the download tool, or makes the embedded data, or ''."""
    if is_coco(root):
        return f'python tools/download.py {words}{data_option(root)}'
    if root.name != 'scenes':
        return ''
    default = coco_root().absolute().parent == root.absolute().parent
    return 'python tools/make_scenes.py' + ('' if default else f' --root {root}')


def _cost_rows(model: Any, recipe: QuantConfig | None, needs: Needs) -> list[Row]:
    """Room on the disk, and memory."""
    device = torch.device(get_device())
    if recipe is None:
        memory = forward_memory(device, float_bytes(model.sam), encoder_work(model), decoder_work(model))
        return _disk_rows(model, needs) + _memory_rows(device, memory)
    drawn = recipe.calibration
    costs = estimate_costs(model, recipe, [drawn.max_boxes] * drawn.num_images)
    memory = forward_memory(device, costs.float_size, costs.encoder, costs.decoder)
    return _disk_rows(model, needs, costs) + _memory_rows(device, memory, costs)


def _disk_rows(model: Any, needs: Needs, costs: Costs | None = None) -> list[Row]:
    """What is downloaded and written, against what is free, folder by folder."""
    wanted = []
    plan = costs.plan if costs is not None else None
    for folder, size in needs.downloads.items():
        more = f', and {needs.unknown[folder]} of unknown size' if needs.unknown[folder] else ''
        wanted.append(('disk, downloads', folder, size, more))
    if not model.detector.from_annotations and needs.images:
        wanted.append(('disk, box cache', cache_folder(), needs.images * BOXES_KEPT * BOX_BYTES, ' at most'))
    if costs is not None:
        kept = plan.cache if plan is not None and plan.store == 'disk' else 0
        more = f' (packed {size_text(costs.packed_size)}{f", activation cache {size_text(kept)}" if kept else ""})'
        wanted.append(('disk, results', Path('work_dirs'), costs.packed_size + kept, more))
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


def _memory_rows(device: torch.device, memory: int, costs: Costs | None = None) -> list[Row]:
    """Estimates of `--dry-run` against what the device has."""
    if device.type == 'cuda':
        free, total = free_device_memory(device), torch.cuda.get_device_properties(device).total_memory
    else:
        free, total = free_host_memory(), os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    stages = {'memory, calibrate and evaluate': memory}
    if costs is not None:
        hooks = {f'memory, {hook}': memory + kept for hook, kept in kept_by_hooks(costs.hooks).items()}
        stages = hooks | stages
    if costs is not None and (plan := costs.plan) is not None:
        kept = plan.cache if plan.store == 'device' or (device.type, plan.store) == ('cpu', 'host') else 0
        stages['memory, reconstruct'] = memory + kept + plan.peak
    advice = 'lower --cfg-options model.test_cfg.chunk_size or --quant-options calibration.max_boxes'
    rows = []
    for what, size in stages.items():
        found = f'about {size_text(size)}, {device.type} has {size_text(total)}, of which {size_text(free)} are free'
        rows.append(Row('tight', what, found, advice) if size > total else Row('ok', what, found))
    return rows
