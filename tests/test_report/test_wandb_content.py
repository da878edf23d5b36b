"""What a run shows on wandb, apart from wandb itself."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ptqsam.evaluation import QuantizationError
from ptqsam.report.reconstruction import point_ends, shortened
from ptqsam.report.wandb_content import (
    ITERATION,
    MAX_PICTURES,
    QUANTIZER,
    SERIES,
    STAGES,
    config_of,
    curve_points,
    metrics_of,
    pictures_of,
    plots_of,
    read_table,
    sqnr_points,
    summary_of,
)

SUMMARY = """path,role,kind,quantizer,bits,observer,rule,sqnr_db,cosine
a.input,encoder.a.input,act,Uniform,4,MSE,"rule 1 'a, b'",12.50,0.987000
a.weight,encoder.a.weight,weight,Uniform,4,MinMax,built-in '*',inf,1.000000
b.input,encoder.b.input,act,Uniform,8,MSE,built-in '*',,
"""
ROWS = [
    ['a.input', 'encoder.a.input', 'act', 'Uniform', 4, 'MSE', "rule 1 'a, b'", 12.5, 0.987],
    ['a.weight', 'encoder.a.weight', 'weight', 'Uniform', 4, 'MinMax', "built-in '*'", None, 1.0],
    ['b.input', 'encoder.b.input', 'act', 'Uniform', 8, 'MSE', "built-in '*'", None, None],
]
RESULT = dict(
    metrics=dict(fp=dict(segm_mAP=0.5), quant=dict(segm_mAP=0.25)),
    size_mb=dict(fp=40.0, packed=5.0),
    seconds=dict(calibrate=1.5),
    peak_memory_mb=100.0,
    compat=['soft_weights'],
    violations=2,
    images=7,
    model='demo',
)


@given(st.dictionaries(st.sampled_from('abc'), st.integers(1, 300)))
def test_every_curve_keeps_its_own_iterations(lengths):
    """One ascending axis for all; each curve has its points there and no others, whatever else is logged."""
    curves = {name: np.arange(length) / length for name, length in lengths.items()}
    points = list(curve_points(curves))
    axis = [point[ITERATION] for point in points]
    assert axis == sorted(set(axis))
    for name, curve in curves.items():
        assert [point[ITERATION] for point in points if name in point] == point_ends(len(curve))
        assert [point[name] for point in points if name in point] == shortened(curve).tolist()


def test_long_curves_are_shortened():
    points = list(curve_points({'a': np.arange(20000.0), 'b': np.ones(20000)}))
    assert 20 < len(points) < 200
    assert points[-1][ITERATION] == 20000
    assert all(point['b'] == 1 for point in points)
    assert not list(curve_points({}))


def test_errors_of_quantizers_are_two_curves():
    choices = [
        SimpleNamespace(point=SimpleNamespace(path=path, kind=kind))
        for path, kind in (('a.input', 'act'), ('a.weight', 'weight'), ('b.input', 'act'), ('c.input', 'act'))
    ]
    errors = {
        'a.input': QuantizationError(20.0, 0.9),
        'a.weight': QuantizationError(30.0, 0.9),
        'b.input': QuantizationError(float('inf'), 1.0),  # exact
    }
    assert list(sqnr_points(choices, errors)) == [
        {QUANTIZER: 1, 'sqnr_db/act': 20.0},
        {QUANTIZER: 2, 'sqnr_db/weight': 30.0},
    ]


def test_config_names_what_runs_are_grouped_by():
    recipe = dict(algorithm='mse', bits=dict(weight=4, act=8), rules=[])
    assert config_of('demo', 'mse_w4a8', 3, recipe) == dict(
        model='demo', quant='mse_w4a8', seed=3, series='demo mse', wxay='W4A8', **recipe
    )


def test_stages_are_those_of_the_loop():
    """The loop has no list of them; what it runs is in its source."""
    source = (Path(__file__).parents[2] / 'ptqsam/solver/loop.py').read_text()
    places = [source.index(f"self.stage('{stage}')") for stage in STAGES]
    assert places == sorted(places) and source.count('with self.stage(') == len(STAGES)


def test_metrics_as_far_as_they_are_known():
    assert metrics_of(dict(fp=None, quant=None)) == {}
    assert metrics_of(dict(fp=dict(mAP=0.5), quant=None)) == {'fp/mAP': 0.5}
    assert metrics_of(dict(fp=None, quant=dict(mAP=0.5))) == {'quant/mAP': 0.5}


def test_summary_names():
    summary = summary_of(RESULT)
    assert summary == {
        'fp/segm_mAP': 0.5,
        'quant/segm_mAP': 0.25,
        'drop/segm_mAP': 0.25,
        'size_mb/fp': 40.0,
        'size_mb/packed': 5.0,
        'seconds/calibrate': 1.5,
        'peak_memory_mb': 100.0,
        'compat': ['soft_weights'],
        'violations': 2,
        'images': 7,
    }
    assert {name.split('/')[0] for name in summary if '/' in name} <= set(SERIES), 'each has an axis'


def test_table_has_numbers(tmp_path):
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    columns, rows = read_table(tmp_path / 'summary.csv')
    assert columns == SUMMARY.splitlines()[0].split(',')
    assert rows == ROWS


def test_plots_of_a_work_dir(tmp_path):
    for name in ('sqnr.png', 'analysis/sensitivity.png', 'masks/1.png', 'analysis/sensitivity.csv'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = {'plots/sqnr': 'sqnr.png', 'plots/analysis/sensitivity': 'analysis/sensitivity.png'}
    assert plots_of(tmp_path) == {name: tmp_path / file for name, file in found.items()}


def test_the_worst_pictures_come_first(tmp_path):
    names = [f'{number:02d}.jpg' for number in range(MAX_PICTURES + 2)]
    gallery = SimpleNamespace(show_dir=tmp_path, pictures=[tmp_path / name for name in names])
    assert [picture.file.name for picture in pictures_of(gallery)] == names[:MAX_PICTURES]
    entries = [
        dict(file=name, image=f'val/{name}', fp_iou=number / 20, objects=number, worst=number / 40)
        for number, name in enumerate(names)
    ]
    entries[-1] |= dict(fp_iou=None, worst=None)
    elsewhere = entries[0] | dict(file='of_another_run.jpg')
    (tmp_path / 'index.json').write_text(json.dumps([entries[-1], elsewhere, *entries[:-1]]))
    first, *others = pictures_of(gallery)
    assert first == (tmp_path / names[-1], f'{MAX_PICTURES + 1:02d}, {MAX_PICTURES + 1} objects')
    assert [file.name for file, _ in others] == names[: MAX_PICTURES - 1]
    assert others[10].caption == '10, 10 objects, mean IoU with FP 0.50, worst 0.25'
    assert pictures_of(None) == []
