"""Embeddings of other runs: the same bits, for the same pixels and weights only."""

import pytest
import torch

from ptqsam.shared_work import SharedWork
from tests.test_projects.helpers import make_model
from tests.tiny import ARCH


@pytest.fixture
def embed(tmp_path):
    """Encodes in a new run; returns whether the embedding was taken, and it."""

    def encode(images, model=None):
        model, shared = model or make_model(), SharedWork(tmp_path)
        with torch.no_grad(), model.embeddings_of_others(shared):
            embedding = model.encode(images)
        with torch.no_grad():
            assert torch.equal(embedding, model.encode(images))
        return shared.taken == ['embeddings'], embedding

    return encode


def images_of(seed=0, count=1):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_same_pixels_and_weights_are_taken(embed):
    first, again, other = embed(images_of()), embed(images_of()), embed(images_of(1))
    assert (first[0], again[0], other[0]) == (False, True, False)
    assert first[1].stride() == again[1].stride() and first[1].dtype == again[1].dtype


@pytest.mark.parametrize('change', ['weight', 'heads', 'decoder'])
def test_another_encoder_takes_nothing(change, embed):
    embed(images_of())
    model = make_model(arch=dict(ARCH, num_heads=4)) if change == 'heads' else make_model()
    with torch.no_grad():
        if change == 'weight':
            model.sam.image_encoder.neck[0].weight[0, 0] += 1e-6
        if change == 'decoder':
            model.sam.mask_decoder.mask_tokens.weight += 1
    assert embed(images_of(), model)[0] == (change == 'decoder')


def test_several_images_at_once_are_not_kept(embed, tmp_path):
    embed(images_of(count=2))
    assert embed(images_of(count=2))[0] is False and not list(tmp_path.iterdir())


def test_the_limit_holds(embed, tmp_path, monkeypatch, capfd):
    embed(images_of())
    (path,) = (tmp_path / 'embeddings').iterdir()
    monkeypatch.setenv('PTQSAM_SHARED_GB', str(2.5e-9 * path.stat().st_size))
    assert [embed(images_of(seed))[0] for seed in (0, 1, 2, 0, 1, 2)] == [True, False, False, True, True, False]
    assert len(list((tmp_path / 'embeddings').iterdir())) == 2
    assert 'no more embeddings are kept' in capfd.readouterr().err
