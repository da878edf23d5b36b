"""H-Deformable-DETR: loads its official files, and computes what the original network computes."""

import cv2
import numpy as np
import pytest
import timm
import torch
from mmdet.models.layers import PatchMerging
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn
from torch.nn import functional as F

from projects.detr_common import to_mmdet
from projects.hdetr.swin import SWIN, Swin, unfold_order
from tests.test_projects import layouts
from tests.test_projects.helpers import make_sample
from tests.test_projects.official import GROUPS, Official, build_on_meta, check_layout, needed
from tests.tiny import ROOT

CONFIG = 'projects.hdetr::hdetr_r50_coco.py'
OFFICIAL = Official('hdetr_r50')
CASES = ('full', 'odd', 'pad', 'wide')
LAYOUTS = {
    'r50': layouts.hdetr_r50,
    'swin-t': lambda: layouts.hdetr_swin(width=96, depths=(2, 2, 6, 2), heads=3),
    'swin-l': lambda: layouts.hdetr_swin(width=192, depths=(2, 2, 18, 2), heads=6, queries=900),
}


@needed
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('group', GROUPS)
def test_computes_what_the_original_computes(group, case, seen):
    OFFICIAL.check(case, group, seen[case])


@needed
def test_detects_in_an_image_file(official_detector, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 320, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'a.png'), pixels)
    found = official_detector.detect(make_sample(img_id=1, img_path=str(tmp_path / 'a.png')), torch.device('cpu'))
    # by hand: resized to fit 1333 x 800, red first, normalised
    resized = cv2.resize(pixels, (1333, 33), interpolation=cv2.INTER_LINEAR)[..., ::-1].astype(np.float32)
    image = torch.from_numpy((resized - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]).float()
    meta = dict(img_shape=(33, 1333), batch_input_shape=(33, 1333))
    with torch.no_grad():
        sample = official_detector._model.predict(
            image.permute(2, 0, 1)[None], [DetDataSample(metainfo=meta)], rescale=False
        )[0]
    expected = sample.pred_instances
    assert len(found) == 100
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    scale = torch.tensor([1333 / 320, 33 / 8] * 2)
    torch.testing.assert_close(found.bboxes, expected.bboxes / scale, rtol=0, atol=1e-3)


@needed
def test_every_official_name_goes_where_the_manifest_says():
    model = build_on_meta('hdetr/configs/hdetr_r50_coco.py')
    own, filled = model.state_dict(), set()
    for name, entry in OFFICIAL.manifest['mmdet_map'].items():
        renamed = model.from_official({name: torch.empty(OFFICIAL.manifest['tensors'][name], device='meta')})
        assert list(renamed) == ([entry['to']] if entry['to'] else []), name
        for target, tensor in renamed.items():
            assert tensor.shape == own[target].shape, f'{name} -> {target}'
            filled.add(target)
    assert OFFICIAL.manifest['mmdet_map'].keys() == OFFICIAL.manifest['tensors'].keys()
    # FrozenBatchNorm counts no batches
    assert filled == {name for name in own if not name.endswith('num_batches_tracked')}


def make_small() -> nn.Module:
    """A small H-Deformable-DETR with random weights: ResNet-18, one layer, 10 queries."""
    config = Config.fromfile(ROOT / 'projects/hdetr/configs/hdetr_r50_coco.py')
    config.merge_from_dict(
        {
            'model.num_queries': 10,
            'model.backbone.depth': 18,
            'model.neck.in_channels': [128, 256, 512],
            'model.encoder.num_layers': 1,
            'model.decoder.num_layers': 1,
        }
    )
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(config.model)
    model.init_weights()
    return model.eval()


@torch.no_grad()
def test_content_of_the_queries_is_learned_and_their_position_is_not():
    model = make_small()
    memory, shapes = torch.randn(1, 60, 256), torch.tensor([[6, 10]])
    before = {key: value.clone() for key, value in model.pre_decoder(memory, None, shapes)[0].items()}
    assert torch.equal(before['query'][0], model.query_embedding.weight)
    # mmdet takes the content from this half
    model.pos_trans_norm.bias[256:] += 1
    same = model.pre_decoder(memory, None, shapes)[0]
    assert all(torch.equal(same[key], before[key]) for key in before)
    model.pos_trans_norm.bias[:256] += 1
    model.query_embedding.weight += 2
    moved = model.pre_decoder(memory, None, shapes)[0]
    torch.testing.assert_close(moved['query_pos'], before['query_pos'] + 1)
    torch.testing.assert_close(moved['query'], before['query'] + 2)
    assert torch.equal(moved['reference_points'], before['reference_points'])


@pytest.mark.parametrize('backbone', LAYOUTS)
def test_the_official_file_fits(backbone):
    config, layout = f'hdetr/configs/hdetr_{backbone}_coco.py', LAYOUTS[backbone]()
    check_layout(config, layout)
    # the first rows are used, and the number of the others is that of the training
    assert build_on_meta(config).num_queries == layout['query_embed.weight'][0] - 1500


@needed
def test_the_layout_is_that_of_the_manifest():
    assert layouts.hdetr_r50() == OFFICIAL.shapes()


@pytest.mark.parametrize(('height', 'width'), [(6, 8), (5, 7)])
@torch.no_grad()
def test_patch_merging_reordered_computes_what_the_original_computes(height, width):
    torch.manual_seed(0)
    image = torch.randn(1, height, width, 3)
    norm, reduction = nn.LayerNorm(12), nn.Linear(12, 6, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    padded = F.pad(image, (0, 0, 0, width % 2, 0, height % 2))
    pixels = [padded[:, y::2, x::2] for y, x in ((0, 0), (1, 0), (0, 1), (1, 1))]
    expected = reduction(norm(torch.cat(pixels, -1)))

    merging = PatchMerging(in_channels=3, out_channels=6)
    original = {'norm.weight': norm.weight, 'norm.bias': norm.bias, 'reduction.weight': reduction.weight}
    merging.load_state_dict({name: unfold_order(value) for name, value in original.items()})
    merged, size = merging(image.flatten(1, 2), (height, width))
    assert size == tuple(expected.shape[1:3])
    torch.testing.assert_close(merged, expected.flatten(1, 2))


@torch.no_grad()
def test_swin_computes_what_another_implementation_computes():
    """timm's Swin reads original weights as they are; only its stages begin with the merging that ends ours."""
    torch.manual_seed(0)
    sizes = dict(depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=4)
    options = dict(img_size=(256, 384), embed_dim=8, features_only=True, out_indices=(1, 2, 3), **sizes)
    theirs = timm.create_model('swin_tiny_patch4_window7_224', pretrained=False, **options).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    state = {}
    for name, value in [*theirs.named_parameters(), *theirs.named_buffers()]:
        stage, _, rest = name.removeprefix('layers_').partition('.')
        if name.startswith('layers_'):
            name = f'layers.{int(stage) - rest.startswith("downsample")}.{rest}'
        if not name.endswith('attn_mask'):
            state[f'backbone.0.body.{name}'] = value
    ours = Swin(embed_dims=8, out_indices=(1, 2, 3), **sizes)
    ours.eval()
    norms = {f'backbone.0.body.{name}': value for name, value in ours.state_dict().items() if name.startswith('norm')}
    renamed = {name.removeprefix('backbone.'): value for name, value in to_mmdet(state | norms, SWIN).items()}
    indices = {name: value.clone() for name, value in ours.state_dict().items() if name.endswith('position_index')}
    ours.load_state_dict(renamed)
    assert indices
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in indices.items())
    image = torch.randn(1, 3, 256, 384)
    for expected, level in zip(theirs(image), ours(image), strict=True):
        expected = F.layer_norm(expected, expected.shape[-1:]).permute(0, 3, 1, 2)
        torch.testing.assert_close(level, expected, rtol=1e-3, atol=1e-4)
