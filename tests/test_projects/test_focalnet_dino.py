"""DINO with FocalNet-L: loads its official file, and computes what the original network computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from projects.focalnet_dino import FocalNet
from tests.test_projects import layouts
from tests.test_projects.official import GROUPS, Official, build_on_meta, check_layout, needed

CONFIG = 'projects.focalnet_dino::dino_focalnet-l_coco.py'
FILE = 'focalnet_dino/configs/dino_focalnet-l_coco.py'
OFFICIAL = Official('focalnet_l_dino')
CASES = ('full', 'odd', 'pad')


@needed
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('group', GROUPS)
def test_computes_what_the_original_computes(group, case, seen):
    OFFICIAL.check(case, group, seen[case])


def test_the_official_file_fits():
    check_layout(FILE, layouts.dino_focalnet())


@needed
def test_every_official_name_goes_where_the_manifest_says():
    model = build_on_meta(FILE)
    own, filled = model.state_dict(), set()
    places = {name: entry['to'] for name, entry in OFFICIAL.manifest['mmdet_map'].items()}
    for name, entry in OFFICIAL.manifest['timm_map'].items():
        # the manifest names the plain network of timm, in which stages are `layers.i`; it has no output norms
        target = entry['to'] and f'body.{entry["to"]}'.replace('body.layers.', 'body.layers_')
        places[name] = f'backbone.{target or name.replace("backbone.0.norm", "norms.")}'
    assert places.keys() == OFFICIAL.manifest['tensors'].keys()
    for name, place in places.items():
        renamed = model.from_official({name: torch.empty(OFFICIAL.manifest['tensors'][name], device='meta')})
        assert list(renamed) == ([place] if place else []), name
        for target, tensor in renamed.items():
            assert tensor.shape == own[target].shape, f'{name} -> {target}'
            filled.add(target)
    assert filled == set(own)


@needed
def test_the_layout_is_that_of_the_manifest():
    assert layouts.dino_focalnet() == OFFICIAL.shapes()


def test_linear_maps_become_convolutions():
    model, weight = build_on_meta(FILE), torch.arange(12.0).reshape(4, 3)
    renamed = model.from_official({'backbone.0.layers.2.blocks.17.mlp.fc1.weight': weight})
    (name, convolution), *rest = renamed.items()
    assert name == 'backbone.body.layers_2.blocks.17.mlp.fc1.weight'
    assert not rest
    image = torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(F.conv2d(image, convolution)[0, :, 0, 1], weight @ image[0, :, 0, 1])


@pytest.fixture(scope='module')
def small() -> FocalNet:
    torch.manual_seed(0)
    return FocalNet('focalnet_tiny_srf').eval()


@pytest.mark.parametrize(('height', 'width', 'padded'), [(33, 47, (36, 48)), (36, 48, (36, 48)), (34, 68, (36, 68))])
@torch.no_grad()
def test_image_is_padded_to_whole_patches(height, width, padded, small):
    image = torch.randn(1, 3, height, width)
    levels = small(image)
    assert levels[0].shape[-2:] == (padded[0] // 4, padded[1] // 4)
    whole = F.pad(image, (0, padded[1] - width, 0, padded[0] - height))
    assert all(torch.equal(level, other) for level, other in zip(levels, small(whole), strict=True))


@torch.no_grad()
def test_outputs_are_normalised(small):
    for level in small(torch.randn(1, 3, 64, 64)):
        torch.testing.assert_close(level.mean(1), torch.zeros_like(level[:, 0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(level.var(1, correction=0), torch.ones_like(level[:, 0]), rtol=0, atol=1e-2)


def test_settings_of_the_backbone():
    modules = list(build_on_meta(FILE).backbone.modules())
    modulations = [module for module in modules if hasattr(module, 'normalize_modulator')]
    assert len(modulations) == 24
    assert all(module.normalize_modulator and module.focal_level == 4 for module in modulations)
    # four of the stem and the reductions, two of each block, four at the outputs
    norms = [module for module in modules if isinstance(module, nn.LayerNorm)]
    assert [module.eps for module in norms] == [1e-5] * (4 + 2 * 24 + 4)


def test_nothing_of_the_training_is_left():
    model = build_on_meta(FILE)
    assert not [name for name in model.state_dict() if name.startswith('dn_query_generator')]
    assert model.from_official({'label_enc.weight': torch.zeros(92, 256)}) == {}
