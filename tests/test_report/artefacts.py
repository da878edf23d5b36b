"""What a run leaves, small, by the writers of the run itself where they take plain values."""

import csv
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ptqsam.reconstruction.optimise import Outcome
from ptqsam.report.clipping import Clipped, write_clipping
from ptqsam.report.condition_number import LayerCondition, write_conditions
from ptqsam.report.reconstruction import write_outcomes
from ptqsam.report.summary import COLUMNS

PATHS = [
    *(
        f'image_encoder.blocks.{n}.attn.{name}'
        for n in range(4)
        for name in ('qkv.input', 'qkv.weight', 'q', 'softmax')
    ),
    *(f'mask_decoder.transformer.layers.0.self_attn.{name}' for name in ('q_proj.input', 'q_proj.weight', 'k')),
]
KINDS = ['weight' if path.endswith('weight') else 'act' for path in PATHS]


def write_artefacts(folder: Path) -> None:
    """Fill the work dir of a run.

    Args:
        folder: exists.
    """
    write_rows(folder / 'summary.csv', COLUMNS, [summary_row(n) for n in range(len(PATHS))])
    losses = torch.linspace(1.0, 0.4, 20)
    outcomes = {f'image_encoder.blocks.{n}': Outcome(1.0, 0.4 + n / 4, 0.01, 0.0, losses) for n in range(4)}
    write_outcomes(folder / 'reconstruction.csv', outcomes)
    conditions = {path: LayerCondition(50.0 * (n + 1)) for n, path in enumerate(PATHS)}
    conditions[PATHS[1]] = LayerCondition(5000.0, 10.0, 8, 0.1, 12.0, 14.0, 20.0)
    write_conditions(folder / 'condition_number.csv', conditions)
    clipped = Clipped(-9.0, 9.0, -8.0, 8.0, -4.0, 4.0, 0.99, 0.8, 0.9, 0.7, 0.85, 0.01, 0.02)
    write_clipping(folder / 'clipping.csv', {PATHS[-1]: clipped, PATHS[-3]: clipped})
    found = dict(bimodal=True, peaks=[-1.5, 1.5], flipped=3, channels=8)
    (folder / 'big.json').write_text(json.dumps(dict(images=['a.jpg'], attentions={'mask_decoder.a': found})))
    Image.fromarray(np.full((60, 90, 3), 200, np.uint8)).save(folder / 'big.png')
    write_masks(folder / 'masks')
    write_analysis(folder / 'analysis')


def write_masks(folder: Path, count: int = 3, names: str = 'image {}') -> None:
    """Pictures and their list."""
    folder.mkdir()
    entries = []
    for number in range(count):
        name = f'{names.format(number)}.jpg'
        pixels = np.random.default_rng(number).integers(0, 255, (40, 1500, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
        entries.append(dict(file=name, image=name, fp_iou=0.5 + number / 10, objects=2, worst=0.1))
    (folder / 'index.json').write_text(json.dumps(entries))


def write_analysis(folder: Path) -> None:
    """What `tools/analyze.py` leaves."""
    folder.mkdir()
    names = ('path', 'role', 'kind', 'bits', 'numel', 'macs', 'enabled_sqnr_db', 'enabled_iou')
    rows = [
        (path, 'a.role', kind, bits, 100, 1000, 10 + n, 0.5 + n / 100, *((5, 0.4) if bits == 4 else ('', '')))
        for n, (path, kind) in enumerate(zip(PATHS, KINDS, strict=True))
        for bits in (3, 4)
    ]
    write_rows(folder / 'sensitivity.csv', (*names, 'disabled_sqnr_db', 'disabled_iou'), rows)
    heads = ('path', 'role', 'kind', 'channel_spread', 'kurtosis')
    table = [(path, 'a.role', kind, 1.5, 3.0) for path, kind in zip(PATHS, KINDS, strict=True)]
    write_rows(folder / 'statistics.csv', heads, table)
    edges = np.linspace(-1, 1, 257).tolist()
    histogram = dict(edges=edges, counts=list(range(256)), levels=[-1.0, 0.0, 2.0], bits=4, quantizer='Uniform')
    (folder / 'histograms.json').write_text(json.dumps({'a.point': dict(histogram, role='a.role')}))
    lo, hi, group = [-1.0, -2.0, -8.0, -9.0], [1.0, 2.0, 8.0, 9.0], [0, 0, 1, 1]
    groups = dict(lo=lo, hi=hi, group=group, group_lo=[-2.0, -9.0], group_hi=[2.0, 9.0])
    (folder / 'channel_groups.json').write_text(json.dumps({PATHS[0]: groups}))


def summary_row(number: int) -> tuple:
    sqnr = 'inf' if number == 2 else f'{20 - number:.2f}'
    return PATHS[number], 'a.role', KINDS[number], 'Uniform', 4, 'MinMax', 'rules[0]', sqnr, '0.99'


def write_rows(path: Path, heads: tuple, rows: list[tuple]) -> None:
    with path.open('w', newline='') as file:
        csv.writer(file).writerows([heads, *rows])
