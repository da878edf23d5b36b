"""Runs to report on."""

import dataclasses
import json
from pathlib import Path

from ptqsam.sweep.ledger import Ledger
from ptqsam.sweep.records import Record

BASE = Record(
    name='',
    key='',
    model='yolox-l_sam-vit-b',
    recipe='mse',
    bits=dict(weight=4, act=4),
    seed=0,
    options={},
    status='pending',
    result=None,
    error='',
    folder=Path('nowhere'),
    seconds=None,
    host='',
)


def run(quant: float | None = None, fp: float | None = None, bits: str = 'W4A4', **fields) -> Record:
    """A record; done, if it has a metric.

    Args:
        quant: mAP of the quantized model, a fraction.
        fp: likewise of the float model.
        bits: as in tables.
        fields: of the record; `compat`, `images` and `size` are those of its result.
    """
    compat, images, size = fields.pop('compat', []), fields.pop('images', 5000), fields.pop('size', 8.3)
    weight, act = (int(text) for text in bits[1:].split('A'))
    record = dataclasses.replace(BASE, bits=dict(weight=weight, act=act), **fields)
    if quant is not None:
        result = dict(
            model=record.model,
            quant=f'{record.recipe}_{bits.lower()}',
            bits=record.bits,
            metrics=dict(fp=None if fp is None else dict(segm_mAP=fp), quant=dict(segm_mAP=quant)),
            size_mb=dict(fp=39.3, **({} if compat else dict(packed=size))),
            seconds=dict(load=0.5, calibrate=10.25, evaluate=20.0),
            peak_memory_mb=2500.0,
            compat=list(compat),
            seed=record.seed,
            images=images,
            processes=1,
        )
        record = dataclasses.replace(record, status='done', result=result)
    name = record.name or f'{record.model}/{record.recipe}_{bits.lower()}-{record.seed}'
    return dataclasses.replace(record, name=name)


def write_sweep(folder: Path, records: list[Record]) -> Path:
    """The folder of a sweep with these cells, as `tools/sweep.py` leaves it."""
    ledger, cells = Ledger(folder), []
    for number, record in enumerate(records):
        names = dict(model_name=record.model, recipe_name=record.recipe, bits=record.bits, seed=record.seed)
        command = dict(model='model.py', recipe='recipe.yaml', arguments=['--seed', str(record.seed)])
        spec = dict(names, **command, folder=str(number), varied=record.options)
        cells.append((str(number), record.name, spec))
    ledger.plan(cells)
    for number, record in enumerate(records):
        cell = folder / 'cells' / str(number)
        cell.mkdir(parents=True)
        if record.result is not None:
            (cell / 'result.json').write_text(json.dumps(record.result))
        metrics = record.result and record.result['metrics']
        ledger.settle(str(number), record.status, record.error, metrics)
    (folder / 'sweep.yaml').write_text('axes: {model: demo}\n')
    return folder
