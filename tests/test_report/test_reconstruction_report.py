"""What is said about a reconstruction: the table of its units, and a picture of any outcomes."""

import csv
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from ptqsam.reconstruction.optimise import Outcome
from ptqsam.report.reconstruction import (
    COLUMNS,
    POINTS,
    WORST,
    draw_curves,
    draw_ratios,
    plot_outcomes,
    point_ends,
    ratio,
    relative_losses,
    shortened,
    tick_values,
    write_outcomes,
)


def outcome(nearest=4.0, reconstructed=1.0, flipped=0.05, unsettled=0.0, iters=100):
    losses = torch.linspace(nearest, reconstructed, iters)
    return Outcome(nearest, reconstructed, flipped, unsettled, losses)


def test_table_has_a_row_per_unit_in_the_order_of_execution(tmp_path):
    units = {'image_encoder.blocks.0.mlp': outcome(), 'image_encoder.blocks.0.attn': outcome(0.0, 0.0, 0.25, 1 / 3)}
    write_outcomes(tmp_path / 'reconstruction.csv', units)
    content = (tmp_path / 'reconstruction.csv').read_text()
    assert '\r' not in content, 'as summary.csv has it'
    header, *rows = csv.reader(content.splitlines())
    assert tuple(header) == COLUMNS
    assert rows == [
        ['image_encoder.blocks.0.mlp', '4', '1', '0.25', '0.05', '0'],
        ['image_encoder.blocks.0.attn', '0', '0', '1', '0.25', '0.333333'],
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / 'reconstruction.csv']


def test_nothing_to_gain_is_no_division_by_zero():
    assert ratio(outcome(0.0, 0.0)) == 1.0
    assert np.isfinite(relative_losses(outcome(0.0, 0.0))).all()


NAMES = {
    'module': [f'image_encoder.blocks.{i}.{part}' for i in range(32) for part in ('attn', 'mlp')],
    'stage': ['image_encoder.blocks.0..2', 'image_encoder.neck', 'mask_decoder.transformer.layers.0'],
    'one': ['image_encoder.neck'],
}


@pytest.mark.parametrize('names', NAMES.values(), ids=NAMES)
def test_picture(names, tmp_path, recwarn):
    units = {name: outcome(reconstructed=0.5 + index % 7) for index, name in enumerate(names)}
    plot_outcomes(tmp_path / 'reconstruction.png', units)
    with Image.open(tmp_path / 'reconstruction.png') as picture:
        assert picture.width >= 1000
        assert len(np.unique(np.asarray(picture.convert('L')))) > 10
    assert list(tmp_path.iterdir()) == [tmp_path / 'reconstruction.png']
    assert not [str(w.message) for w in recwarn if w.category is not DeprecationWarning]


@pytest.mark.parametrize(
    'strange',
    [
        outcome(0.0, 0.0),
        outcome(1.0, 0.0),
        outcome(1e-30, 1e30),
        outcome(1.0, math.inf),
        outcome(math.nan, math.nan),
        outcome(iters=1),
        outcome(1.0, 1.0, 0.0, 1.0),
    ],
    ids=['exact', 'becomes exact', 'explodes', 'infinite', 'nan', 'one iteration', 'nothing learned'],
)
def test_picture_of_strange_outcomes(strange, tmp_path):
    plot_outcomes(tmp_path / 'a.png', {'image_encoder.neck': strange})
    plot_outcomes(tmp_path / 'b.png', {'image_encoder.neck': strange, 'mask_decoder.x': outcome()})
    assert (tmp_path / 'a.png').is_file() and (tmp_path / 'b.png').is_file()


def test_the_units_that_gained_least_are_named():
    axes = Figure().add_subplot()
    ratios = np.linspace(0.2, 1.1, 30)
    ratios[[3, 4]] = math.nan, math.inf
    worst = draw_ratios(axes, ratios, ['black'] * 30)
    assert worst == [4, *range(29, 20, -1)] and len(worst) == WORST
    assert axes.get_title('right') == f'{int((ratios < 1).sum())} of 30 units improved'
    heights = {round(bar.get_y() + bar.get_height(), 6) for bar in axes.patches}
    assert round(0.2, 6) in heights and round(1.1, 6) in heights


def test_curves_are_on_one_scale_and_the_worst_are_numbered():
    figure = Figure()
    draw_curves(figure, [np.array([1.0, 0.5]), np.array([1.0, 0.9])], ['red', 'blue'], 9.0, [1, 0])
    first, second = figure.axes
    assert first.get_ylim() == second.get_ylim()
    assert [axes.texts[0].get_text() for axes in figure.axes] == ['2', '1']


def test_tick_values():
    assert tick_values(0.2, 1.1) == [0.2, 0.3, 0.5, 0.7, 1.0]
    assert 1.0 in tick_values(0.9, 1.0)
    assert len(tick_values(1e-9, 10.0)) <= 13 and len(tick_values(1e-30, 1e30)) <= 13


def test_shortened_curves_keep_the_mean():
    values = np.random.default_rng(0).random(997)
    short, ends = shortened(values), point_ends(997)
    assert len(short) == len(ends) == POINTS and ends[-1] == 997
    sizes = np.diff([0, *ends])
    assert sizes.max() - sizes.min() <= 1
    assert np.average(short, weights=sizes) == pytest.approx(values.mean())
    assert shortened(values[:7]) == pytest.approx(values[:7])
