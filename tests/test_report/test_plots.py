"""Plot of the quantizers' errors: every quantizer has a bar, the worst are named, odd values are marked."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import _pylab_helpers
from matplotlib.figure import Figure
from PIL import Image

from ptqsam.report import plots
from ptqsam.report.plots import LOWEST, draw_bars, list_worst, module_groups, plot_quantization_errors


def choice(path: str, kind: str = 'act') -> SimpleNamespace:
    return SimpleNamespace(point=SimpleNamespace(path=path, kind=kind))


def error(sqnr: float) -> SimpleNamespace:
    return SimpleNamespace(sqnr=sqnr)


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path).convert('RGB')).astype(int)


def share_of(picture: np.ndarray, colour: str) -> float:
    """Share of a picture that has a colour '#rrggbb'."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(picture - rgb).max(axis=2) < 12).mean())


def test_plot_shows_both_kinds_and_all_groups(tmp_path):
    paths = ['image_encoder.layers.0.a', 'image_encoder.neck.0', 'mask_decoder.transformer.a']
    choices = [choice(f'{path}.{kind}', kind) for path in paths for kind in ('act', 'weight')]
    errors = {c.point.path: error(10.0 + i) for i, c in enumerate(choices)}
    plot_quantization_errors(tmp_path / 'new' / 'sqnr.png', choices, errors)
    picture = pixels(tmp_path / 'new' / 'sqnr.png')
    half = len(picture) // 2
    for panel in (picture[:half], picture[half:]):
        assert all(share_of(panel, colour) > 0.03 for colour in plots.COLOURS[:3])
    assert share_of(picture, plots.COLOURS[3]) == 0
    assert [file.name for file in (tmp_path / 'new').iterdir()] == ['sqnr.png']
    assert not _pylab_helpers.Gcf.get_all_fig_managers(), 'a figure is left in the global state'


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('kinds', [(), ('weight',), ('act',)])
@pytest.mark.parametrize('sqnr', [12.0, -300.0, math.inf, math.nan, None])
def test_plot_takes_anything(tmp_path, kinds, sqnr):
    choices = [choice(f'mask_decoder.{kind}', kind) for kind in kinds]
    errors = {} if sqnr is None else {c.point.path: error(sqnr) for c in choices}
    plot_quantization_errors(tmp_path / 'sqnr.png', choices, errors)
    assert pixels(tmp_path / 'sqnr.png').shape == (935, 1650, 3)


def test_a_failed_plot_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError('disk full')

    monkeypatch.setattr(Figure, 'savefig', fail)
    with pytest.raises(OSError, match='disk full'):
        plot_quantization_errors(tmp_path / 'sqnr.png', [choice('mask_decoder.a')], {})
    assert not list(tmp_path.iterdir())


def test_bars_are_the_values():
    axes = Figure().add_subplot()
    values = np.array([20.0, math.inf, 5.0, math.nan, -100.0, 30.0])
    assert draw_bars(axes, values, ['black'] * 6) == [4, 2, 0, 5]
    heights = [bar.get_height() for bar in axes.patches]
    assert [heights[i] for i in (0, 2, 3, 4, 5)] == [20, 5, 0, LOWEST, 30]
    assert heights[1] > 30
    assert [bar.get_hatch() is not None for bar in axes.patches] == [i == 1 for i in range(6)]
    assert axes.lines[0].get_xdata().tolist() == [3]
    assert {text.get_text(): text.xy[0] for text in axes.texts} == {'1': 4, '2': 2, '3': 0, '4': 5}
    low, high = axes.get_ylim()
    assert low == LOWEST
    assert high > heights[1]
    assert axes.get_title(loc='right') == 'hatched: exact (infinite), ×: not measured'


def test_only_ten_are_named():
    axes = Figure().add_subplot()
    worst = draw_bars(axes, np.arange(30.0)[::-1], ['black'] * 30)
    assert worst == list(range(29, 19, -1))
    assert len(axes.texts) == 10


def test_the_list_names_them_with_their_values():
    figure = Figure()
    list_worst(figure, 1.0, [('mask_decoder.a', -300.0), ('mask_decoder.b', 1.25)])
    texts = [text.get_text() for text in figure.texts]
    assert texts == ['1', '-300.0 dB', 'mask_decoder.a', '2', '1.2 dB', 'mask_decoder.b']
    heights = [text.get_position()[1] for text in figure.texts]
    assert heights[0] == heights[2] > heights[3] == heights[5]


@pytest.mark.parametrize(
    ('blocks', 'stages'),
    [
        # SAM-B, -L, -H: as many blocks in a stage as between two global attentions
        (12, ['blocks 0-2', 'blocks 3-5', 'blocks 6-8', 'blocks 9-11']),
        (24, ['blocks 0-5', 'blocks 6-11', 'blocks 12-17', 'blocks 18-23']),
        (32, ['blocks 0-7', 'blocks 8-15', 'blocks 16-23', 'blocks 24-31']),
        (2, ['blocks 0', 'blocks 1']),
        (5, ['blocks 0-1', 'blocks 2-3', 'blocks 4']),
    ],
)
def test_blocks_are_joined_to_stages(blocks, stages):
    groups = module_groups([f'image_encoder.blocks.{i}.attn.qkv.input' for i in range(blocks)])
    assert list(dict.fromkeys(groups.values())) == [f'encoder {stage}' for stage in stages]


def test_groups_of_mobile_sam():
    groups = {
        'image_encoder.patch_embed.conv1.weight': 'encoder patch embed',
        'image_encoder.layers.0.blocks.1.conv1.weight': 'encoder layers 0',
        'image_encoder.layers.3.blocks.1.attn.softmax': 'encoder layers 3',
        'image_encoder.neck.2.input': 'encoder neck',
        'prompt_encoder.mask_downscaling.0.input': 'prompt encoder',
        'mask_decoder.transformer.layers.0.self_attn.q': 'mask decoder',
    }
    assert module_groups(list(groups)) == groups
