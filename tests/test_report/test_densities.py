"""Picture of densities: one panel per tensor, before and after in two colours, peaks or none."""

import numpy as np
import torch
from matplotlib import _pylab_helpers
from PIL import Image

from ptqsam.hooks.bimodal_integration import bimodality
from ptqsam.report.densities import COLOURS, plot_densities


def has_colour(picture: np.ndarray, colour: str) -> bool:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(picture.astype(int) - rgb).max(axis=2) < 12).any())


def test_panels(tmp_path):
    x = torch.linspace(-1, 1, 1000)
    changed = [bimodality(x + 5 * x.sign()), bimodality(x.abs() + 5)]
    plot_densities(tmp_path / 'big.png', {'changed': changed, 'unchanged': [bimodality(x**3)]})
    picture = np.array(Image.open(tmp_path / 'big.png').convert('RGB'))
    upper, lower = np.array_split(picture, 2)
    assert has_colour(upper, COLOURS[0]) and has_colour(upper, COLOURS[1])
    assert has_colour(lower, COLOURS[0]) and not has_colour(lower, COLOURS[1])
    assert [path.name for path in tmp_path.iterdir()] == ['big.png']
    assert not _pylab_helpers.Gcf.get_all_fig_managers(), 'a figure is left in the global state'


def test_equal_values(tmp_path):
    plot_densities(tmp_path / 'big.png', {'constant': [bimodality(torch.ones(5))]})
    assert (tmp_path / 'big.png').stat().st_size > 0
