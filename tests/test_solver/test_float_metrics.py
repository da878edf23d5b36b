"""Metrics of the float model are taken where they fit, with the masks that a gallery draws."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ptqsam.report import Gallery
from ptqsam.shared_work import SharedWork
from ptqsam.solver.float_metrics import shared_metrics
from tests.test_report.test_gallery import LEFT, RIGHT, Dataset, rectangle, rle, sample

METRICS = dict(segm_mAP=1 / 3, mask_mIoU=float('nan'))


@pytest.fixture
def metrics_of(tmp_path):
    """Asks for metrics; returns what was taken, the metrics and the gallery's float results."""
    dataset = Dataset(tmp_path, count=3)

    def ask(conditions, max_images=0):
        gallery = Gallery(tmp_path / 'masks', dataset, max_images) if max_images else None

        def evaluate():
            masks, boxes = [rectangle(*LEFT), rectangle(*RIGHT)], np.array([LEFT, RIGHT]) + 1 / 3
            for path in dataset.paths if gallery else ():
                gallery.add('fp', [sample(path, masks, scores=(1.0, 0.5), boxes=boxes.tolist())])
            return METRICS

        shared = SharedWork(tmp_path / 'cache')
        found = shared_metrics(shared, conditions, evaluate, gallery)
        return SimpleNamespace(taken=shared.taken, metrics=found, masks=gallery and gallery._float)

    return ask


def test_metrics_go_by_conditions(metrics_of):
    runs = [metrics_of(dict(data=data)) for data in 'aab']
    assert [run.taken for run in runs] == [[], ['fp'], []]
    assert all(repr(run.metrics) == repr(METRICS) for run in runs)


def test_bits_of_the_machine_are_conditions(metrics_of):
    threads = torch.get_num_threads()
    metrics_of(dict(data='a'))
    try:
        torch.set_num_threads(threads + 1)
        assert metrics_of(dict(data='a')).taken == []
    finally:
        torch.set_num_threads(threads)
    assert metrics_of(dict(data='a')).taken == ['fp']


def test_pictures_need_the_masks_of_their_images(metrics_of):
    assert metrics_of({}).taken == []
    assert metrics_of({}, 2).taken == [], 'a run without pictures keeps no masks'
    own, taken = metrics_of({}, 3), metrics_of({}, 3)
    assert (own.taken, taken.taken) == ([], ['fp'])
    assert metrics_of({}).taken == metrics_of({}, 2).taken == ['fp'], 'fewer pictures'
    assert taken.masks.keys() == own.masks.keys() and len(own.masks) == 3
    expected = [rle(rectangle(*box))['counts'].decode() for box in (LEFT, RIGHT)]
    for path, ours in own.masks.items():
        theirs = taken.masks[path]
        assert theirs.total == ours.total and np.array_equal(theirs.boxes, ours.boxes)
        assert theirs.boxes.dtype == ours.boxes.dtype and np.array_equal(theirs.index, ours.index)
        assert [mask['counts'] for mask in theirs.masks] == expected
