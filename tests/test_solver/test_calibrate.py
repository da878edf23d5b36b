"""Calibration images: random, repeatable, never evaluated ones; boxes capped."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from ptqsam.errors import ConfigError
from ptqsam.solver.calibrate import batches_with_boxes, draw_images, limit_boxes

NAMES = [f'{i:03d}.jpg' for i in range(100)]


@given(count=st.integers(1, 60), seed=st.integers(0, 2**31), shared=st.sets(st.sampled_from(NAMES), max_size=40))
def test_drawn_images(count, seed, shared):
    drawn = draw_images(NAMES, sorted(shared), count, seed)
    assert drawn == draw_images(NAMES, sorted(shared), count, seed)
    assert len(set(drawn)) == count and drawn == sorted(drawn)
    assert not {NAMES[i] for i in drawn} & shared


def test_the_draw_is_not_the_first_images_and_depends_on_the_seed():
    assert draw_images(NAMES, [], 32, 0) != list(range(32))
    assert draw_images(NAMES, [], 32, 0) != draw_images(NAMES, [], 32, 1)


def test_too_few_images():
    with pytest.raises(ConfigError, match=r'101 wanted, but the calibration set has 100; .*num_images=100'):
        draw_images(NAMES, [], 101, 0)
    with pytest.raises(
        ConfigError, match=r'has 0 \(100 more have the names of evaluated images; calibrate on the train split\)$'
    ):
        draw_images(NAMES, NAMES, 1, 0)


def test_boxes_are_capped_in_their_order():
    sample = DetDataSample(proposals=InstanceData(scores=torch.arange(50)))
    limit_boxes(sample, 16, np.random.default_rng(0))
    scores = sample.proposals.scores
    assert len(scores) == 16 and torch.equal(scores, scores.sort().values)
    limit_boxes(sample, 20, np.random.default_rng(0))
    assert len(sample.proposals) == 16


@given(st.lists(st.integers(0, 30), max_size=8), st.integers(0, 9), st.integers(1, 9))
def test_batches_with_boxes_are_those_of_calibration(counts, seed, most):
    """Same boxes as where every image is limited in turn, but without the images that have none."""

    def make_batches():
        proposals = (InstanceData(scores=torch.arange(count)) for count in counts)
        return [{'data_samples': [DetDataSample(proposals=each)]} for each in proposals]

    def scores(batch):
        return batch['data_samples'][0].proposals.scores.tolist()

    rng, expected = np.random.default_rng(seed), make_batches()
    for batch in expected:
        limit_boxes(batch['data_samples'][0], most, rng)
    found = [scores(batch) for batch in batches_with_boxes(make_batches(), most, seed)]
    assert found == [scores(batch) for batch in expected if scores(batch)]
