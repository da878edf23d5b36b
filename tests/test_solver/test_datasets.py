"""The images that calibrate: none of those that are evaluated, which the user is told once."""

import logging

import pytest
from mmengine.registry import DefaultScope

from ptqsam.cli import load_model_config
from ptqsam.config import load_quant_config
from ptqsam.solver import datasets
from ptqsam.solver.datasets import build_calib_loader, build_dataset, image_names


@pytest.mark.parametrize('main', [True, False])
def test_evaluated_images_are_left_out_and_told_by_the_main_process(main, tiny, monkeypatch, caplog):
    monkeypatch.setattr(datasets, 'is_main_process', lambda: main)
    config, recipe = load_model_config(str(tiny / 'tiny.py'), {}), load_quant_config(tiny / 'recipe.yaml')
    with DefaultScope.overwrite_default_scope('mmdet'):
        evaluated = image_names(build_dataset(config.calib_dataset))[:2]
        loader = build_calib_loader(config.calib_dataset, recipe, evaluated, 0, logging.getLogger('test'))
    assert len(loader.dataset) == 2 and not set(image_names(loader.dataset)) & set(evaluated)
    said = ['calibration: 2 of 4 images are evaluated as well; they are left out']
    assert [record.getMessage() for record in caplog.records if record.name == 'test'] == (said if main else [])
