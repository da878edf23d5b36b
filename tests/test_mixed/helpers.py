"""A sensitivity table by brute force: what tools/analyze.py measures, on one image of the tiny pipeline."""

import csv
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from ptqsam.config import load_quant_config
from ptqsam.modules.walk import quantizers, quantizers_off
from ptqsam.solver.calibrate import calibrate_activations, calibrate_weights
from ptqsam.solver.datasets import build_calib_loader
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook

COLUMNS = ('path', 'role', 'kind', 'bits', 'enabled_sqnr_db', 'enabled_iou')


def tiny_model(folder: Path) -> Any:
    """The tiny pipeline's model in float, without its weights."""
    init_default_scope('mmdet')
    return MODELS.build(Config.fromfile(folder / 'tiny.py').model).eval().requires_grad_(False)


def ready_model(folder: Path, bits: int) -> tuple[Any, RuleBook, Any]:
    """The same with weights and quantizers, the rules, and a loader of calibration images with boxes."""
    options = {'bits': dict(weight=bits, act=bits), 'calibration.num_images': 1}
    rules = RuleBook(load_quant_config(folder / 'recipe.yaml', options))
    model = tiny_model(folder)
    model.init_weights()
    quantize_model(model.sam, rules)
    data = Config.fromfile(folder / 'tiny.py').calib_dataset
    loader = build_calib_loader(data, rules.config, (), 0, MMLogger.get_current_instance())
    model.attach_boxes(loader.dataset, folder)
    return model, rules, loader


@torch.no_grad()
def sensitivity_rows(folder: Path, bits: int) -> list[dict[str, Any]]:
    """One row per quantizer of the tiny recipe with so many bits."""
    model, rules, loader = ready_model(folder, bits)
    calibrate_activations(model, model.sam, loader, 4, 0)
    calibrate_weights(model.sam)
    ((image, boxes),) = model.sam_inputs(next(iter(loader)))
    exact = None
    rows = []
    points = {choice.point.path: choice.point for choice in rules.enabled}
    for quantizer in (None, *quantizers(model.sam)):
        with quantizers_off(model.sam):
            if quantizer is not None:
                quantizer.mode = 'quantize'
            logits, _ = model.decode_logits(model.encode(image), boxes)
        if quantizer is None:
            exact = logits
            continue
        error, (a, b) = (logits - exact).square().sum(), (logits > 0, exact > 0)
        point = points[quantizer.path]
        rows.append(
            dict(
                path=point.path,
                role=point.role,
                kind=point.kind,
                bits=bits,
                enabled_sqnr_db=float(10 * torch.log10(exact.square().sum() / error)),
                enabled_iou=float((a & b).sum() / (a | b).sum().clamp(min=1)),
            )
        )
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a sensitivity table."""
    with path.open('w', newline='') as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return path
