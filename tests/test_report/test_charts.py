"""Charts: places of values, marks of what has none, and numbers as they are written."""

import math
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptqsam.report.page.charts import Point, accuracy_by_size, before_after, channels, fewer, histogram, profile, ranked
from ptqsam.report.page.svg import Scale, scale_of, short

PATHS = [f'image_encoder.blocks.{n}.attn.q' for n in range(5)]
NUMBERS = st.floats(-1e12, 1e12, allow_subnormal=False)


def rects(svg):
    return [tuple(map(float, found)) for found in re.findall(r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', svg)]


@given(st.lists(NUMBERS, max_size=5), st.booleans())
def test_a_scale_shows_all_values_and_its_ticks_lie_inside(values, log):
    scale = scale_of(values, 200.0, 10.0, log)
    assert scale.low < scale.high
    for value in values:
        assert 10 <= scale(value) <= 200
        if value > 0 or not log:
            assert scale.low <= value <= scale.high
    ticks = scale.ticks()
    assert len(ticks) <= 12 and all(10 <= scale(tick) <= 200 for tick in ticks)


def test_the_smallest_float_has_a_place():
    assert scale_of([sys.float_info.min, 1e12], 0.0, 100.0, log=True)(sys.float_info.min) >= 0


def test_places_by_hand():
    assert Scale(0.0, 10.0, 200.0, 0.0)(2.5) == 150
    assert Scale(1.0, 100.0, 0.0, 100.0, log=True)(10.0) == pytest.approx(50)
    # what lies beyond, or has no logarithm, is drawn at the end
    assert Scale(1.0, 100.0, 0.0, 100.0, log=True)(-1.0) == 0 and Scale(0.0, 1.0, 0.0, 9.0)(7.0) == 9


@pytest.mark.parametrize(
    'value, text',
    [
        (0, '0'),
        (0.25, '0.25'),
        (1234.5, '1234'),
        (10000, '10000'),
        (1e6, '1e6'),
        (-2.5e-7, '-2.5e-7'),
        (math.inf, 'inf'),
    ],
)
def test_numbers_as_people_write_them(value, text):
    assert short(value) == text


def test_bars_begin_at_the_base_and_the_lowest_are_named():
    chart = profile('bars', PATHS, [4.0, 2.0, None, math.inf, 8.0], 'dB')
    heights = [height for _, height in rects(chart.svg)]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2) and heights[3] == pytest.approx(2 * heights[0], abs=0.2)
    assert len(heights) == 4 and heights[2] > heights[3], 'the infinite one is drawn at full height'
    assert chart.named[0] == f'{PATHS[1]}: 2 dB' and len(chart.named) == 3
    assert chart.caption == 'bars; hollow: infinite' and chart.svg.count('hollow') == 1


def test_bars_of_ratios_hang_from_one_and_the_highest_are_named():
    chart = profile('bars', PATHS[:2], [0.5, 2.0], base=1.0, log=True)
    (_, below), (_, above) = rects(chart.svg)
    assert below == pytest.approx(above, abs=0.2)
    assert chart.named[0] == f'{PATHS[1]}: 2'


def test_nothing_known_is_an_empty_chart():
    for chart in (
        profile('a', PATHS, [None] * 5),
        before_after('b', PATHS, {'before': [None] * 5, 'after': [math.nan] * 5}, log=True),
        profile('c', [], []),
    ):
        assert '<rect' not in chart.svg and '<circle' not in chart.svg


def test_dots_are_joined_where_there_are_two():
    chart = before_after('dots', PATHS, {'before': [1.0, 2.0, 3.0, 4.0, 5.0], 'after': [None, 2.5, None, None, 1.0]})
    assert chart.svg.count('<circle') == 7 and chart.svg.count('class="link"') == 2


def test_long_names_keep_their_end():
    name = f'{"very_long." * 12}end'
    chart = ranked('a', [name], [1.0], '%', [name])
    assert '>…' in chart.svg and 'end</text>' in chart.svg


def test_accuracy_has_a_line_per_recipe_through_the_mean_of_its_seeds():
    points = [Point('mse', 8.0, value, 'W4A4') for value in (1.0, 3.0)] + [Point('mse', 10.0, 20.0, 'W6A6')]
    chart = accuracy_by_size('a', points, 50.0)
    assert chart.svg.count('<circle') == 3 and chart.svg.count('<polyline') == 1
    begin = re.search(r'points="[\d.]+,([\d.]+) ', chart.svg)[1]
    heights = sorted(float(y) for y in re.findall(r'cy="([\d.]+)"', chart.svg))
    assert float(begin) == pytest.approx((heights[1] + heights[2]) / 2, abs=0.2)
    assert 'FP 50.0' in chart.svg


def test_histograms_keep_their_counts_and_show_levels():
    edges, counts = fewer([float(n) for n in range(301)], [1.0] * 300)
    assert len(counts) == 100 and sum(counts) == 300 and edges[:2] == [0, 3] and edges[-1] == 300
    edges, counts = fewer([float(n) for n in range(260)], [1.0] * 259)
    assert len(edges) == len(counts) + 1 and sum(counts) == 259 and edges[-1] == 259
    assert histogram('a', [0.0, 1.0, 2.0], [1, 5], [-3.0, 0.5]).svg.count('class="level"') == 2


def test_channels_stand_in_front_of_their_groups():
    chart = channels('a', [-1.0, -8.0, -2.0], [1.0, 8.0, 2.0], [0, 1, 0], [(-2.0, 2.0), (-8.0, 8.0)])
    (_, narrow), (_, wide) = rects(chart.svg)
    assert wide == pytest.approx(4 * narrow, abs=0.3) and chart.svg.count('thin') == 3
