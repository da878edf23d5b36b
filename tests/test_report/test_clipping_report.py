"""Ranges of clipping beside those of observers: table, line and picture, also where the observer's was kept."""

import matplotlib.image
import numpy as np
import pytest

from ptqsam.report.clipping import Clipped, plot_clipping, summarise_clipping, write_clipping

CLIPPED = Clipped(-167.0, 177.0, -100.0, 100.0, -1.0, 1.0, 0.985, 0.25, 0.75, 0.25, 0.5, 0.125, 4.0)
KEPT = Clipped(0.0, 2.0, 0.0, 2.0, 0.0, 2.0, None, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25)
ROWS = {f'decoder.layers.0.self_attn.{name}': CLIPPED for name in ('q_proj.input', 'k_proj.input', 'q')}
ROWS |= {'decoder.layers.0.self_attn.k': CLIPPED, 'decoder.final_attn.q': KEPT}


def test_table(tmp_path):
    write_clipping(tmp_path / 'c.csv', {'a.q': CLIPPED, 'a.k': KEPT})
    assert (tmp_path / 'c.csv').read_text().split('\n') == [
        'quantizer,observed_min,observed_max,observer_lo,observer_hi,lo,hi,percentile,overlap_observer,overlap,'
        'attention_overlap_observer,attention_overlap,mse_observer,mse',
        'a.q,-167,177,-100,100,-1,1,0.985,0.25,0.75,0.25,0.5,0.125,4',
        'a.k,0,2,0,2,0,2,,0.5,0.5,0.5,0.5,0.25,0.25',
        '',
    ]


def test_line():
    assert summarise_clipping({'a.q': CLIPPED}, 1) == (
        '1 of 1 inputs and outputs of q and k projections got a range of PCC; they are in the median 0.01 times as '
        'wide as those of the observers; mean focus overlap of the attentions 0.500, with the ranges of the observers '
        '0.250'
    )
    line = summarise_clipping({'a.q': CLIPPED, 'a.k': KEPT}, 4)
    assert '2 of 4' in line and ', 2 are left out' in line and ', 1 of them that of the observer' in line


@pytest.mark.parametrize('rows', [ROWS, {'a.q': KEPT}, {'a.q': Clipped(*[0.0] * 6, None, *[1.0] * 4, 0.0, 0.0)}])
def test_picture(rows, tmp_path):
    plot_clipping(tmp_path / 'c.png', rows)
    image = matplotlib.image.imread(tmp_path / 'c.png')[..., :3]
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert np.isclose(image, np.array(colour) / 255, atol=0.02).all(-1).any()
    assert image.shape[1] >= 900
