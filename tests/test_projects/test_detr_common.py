"""What H-Deformable-DETR and DINO share: the renaming of official tensors, and their heads."""

import math

import pytest
import torch
from mmdet.models import DETRHead
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope

import projects.focalnet_dino
import projects.hdetr  # noqa: F401  both register their heads
from projects.detr_common import COCO_IDS, Rule, to_mmdet, used_classes
from tests.test_projects.official import Official, build_on_meta, needed

CONFIGS = [
    'hdetr/configs/hdetr_r50_coco.py',
    'hdetr/configs/hdetr_swin-t_coco.py',
    'hdetr/configs/hdetr_swin-l_coco.py',
    'focalnet_dino/configs/dino_focalnet-l_coco.py',
]
META = dict(img_shape=(100, 200), scale_factor=(2.0, 4.0))


def make_head(kind: str, num_classes: int = 3, best: int = 4) -> DETRHead:
    torch.manual_seed(0)
    config = dict(type=kind, num_classes=num_classes, embed_dims=8, num_pred_layer=2, test_cfg=dict(max_per_img=best))
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(dict(config, loss_cls=dict(type='FocalLoss', use_sigmoid=True))).eval()


def test_first_rule_that_matches_decides():
    tensors = {name: torch.ones(2) for name in ('a.x', 'a.y', 'b.x', 'c')}
    rules = [Rule(r'^a\.x$', 'first'), Rule(r'^a\.', 'second.'), Rule(r'^b\.', None), Rule('^c$', 'd', lambda x: 2 * x)]
    renamed = to_mmdet(tensors, rules)
    assert list(renamed) == ['first', 'second.y', 'd']
    assert renamed['first'] is tensors['a.x']
    assert renamed['d'].tolist() == [2, 2]


def test_rows_of_the_80_categories():
    kept = used_classes(torch.arange(91.0))
    assert kept.tolist() == list(COCO_IDS)
    assert len(COCO_IDS) == 80
    assert set(range(91)) - set(COCO_IDS) == {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    # a head for another dataset is left to the loader, which says that it does not fit
    assert used_classes(torch.arange(366.0)).tolist() == list(range(366))


@needed
def test_rows_are_those_of_the_manifests():
    for name in ('hdetr_r50', 'focalnet_l_dino'):
        assert list(COCO_IDS) == Official(name).manifest['class_index_80']


@pytest.mark.parametrize('config', CONFIGS)
def test_own_names_pass_unchanged(config):
    state = build_on_meta(config).state_dict()
    renamed = build_on_meta(config).from_official(state)
    assert list(renamed) == list(state)
    assert all(renamed[name] is state[name] for name in state)


@pytest.mark.parametrize('config', CONFIGS)
def test_unknown_names_survive(config):
    unknown = {
        name: torch.zeros(91, 2)
        for name in (
            'transformer.new.weight',
            'transformer.decoder.new',
            'backbone.0.body.fc.weight',
            'class_embed.9.x',
        )
    }
    renamed = build_on_meta(config).from_official(unknown)
    assert list(renamed) == list(unknown)
    assert all(renamed[name] is unknown[name] for name in unknown)


@pytest.mark.parametrize('config', CONFIGS)
def test_decoder_has_80_classes_and_the_encoder_91(config):
    branches = build_on_meta(config).bbox_head.cls_branches
    assert [branch.out_features for branch in branches] == [80] * 6 + [91]


@pytest.mark.parametrize('kind', ['HDETRHead', 'OfficialDINOHead'])
def test_best_pairs_of_query_and_class(kind):
    logits = torch.tensor([[0.0, 3.0, -1.0], [2.0, -2.0, 1.0], [-3.0, -3.0, -3.0]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1, 0.9, 0.4, 0.4], [0.5, 0.5, 0.1, 0.1]])
    found = make_head(kind)._predict_by_feat_single(logits, boxes, META, rescale=False)
    assert found.labels.tolist() == [1, 0, 2, 0]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0, 1.0, 0.0]).sigmoid())
    # query 1 reaches beyond the left and the lower border of the image of 200 x 100
    first, second = [80.0, 30.0, 120.0, 70.0], [-20.0, 70.0, 60.0, 110.0]
    torch.testing.assert_close(found.bboxes, torch.tensor([first, second, second, first]))
    rescaled = make_head(kind)._predict_by_feat_single(logits, boxes, META, rescale=True)
    torch.testing.assert_close(rescaled.bboxes, found.bboxes / torch.tensor([2.0, 4.0, 2.0, 4.0]))


@pytest.mark.parametrize('kind', ['HDETRHead', 'OfficialDINOHead'])
def test_only_clipping_differs_from_mmdet(kind):
    head, generator = make_head(kind, num_classes=80, best=100), torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(50, 80, generator=generator), torch.rand(50, 4, generator=generator)
    ours = head._predict_by_feat_single(logits, boxes, META, rescale=False)
    theirs = DETRHead._predict_by_feat_single(head, logits, boxes, META, rescale=False)
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(ours.scores, theirs.scores)
    assert not torch.equal(ours.bboxes, theirs.bboxes)
    limits = torch.tensor([200.0, 100.0, 200.0, 100.0])
    assert torch.equal(ours.bboxes.clamp(min=torch.zeros(4), max=limits), theirs.bboxes)


@pytest.mark.parametrize(('kind', 'smallest'), [('HDETRHead', 1e-5), ('OfficialDINOHead', 1e-3)])
def test_references_at_the_border(kind, smallest):
    box = _unmoved(kind, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(torch.logit(box[0]).item(), math.log(smallest), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.logit(box[2].double()).item(), -math.log(smallest), rtol=1e-2, atol=0)
    assert box[1] == 0.5


@needed
@pytest.mark.parametrize(('kind', 'name'), [('HDETRHead', 'hdetr_r50'), ('OfficialDINOHead', 'focalnet_l_dino')])
def test_inverse_sigmoid_is_that_of_the_original(kind, name):
    golden = Official(name).golden
    given, expected = (torch.from_numpy(golden[f'unit/inverse_sigmoid/{key}']) for key in ('in', 'out'))
    torch.testing.assert_close(_unmoved(kind, given), expected.sigmoid(), rtol=0, atol=1e-6)


@torch.no_grad()
def _unmoved(kind: str, coordinates: torch.Tensor) -> torch.Tensor:
    """Box coordinates out of a head whose box branches add nothing to the references."""
    head = make_head(kind)
    for branch in head.reg_branches:
        branch[-1].weight.zero_()
        branch[-1].bias.zero_()
    references = coordinates[None, :, None].expand(1, -1, 4)
    boxes = head(torch.zeros(1, 1, len(coordinates), 8), [references])[1]
    return boxes[-1, 0, :, 0]
