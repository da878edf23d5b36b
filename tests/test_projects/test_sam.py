"""SAM as a plain module: sizes, official key layout, and errors that say which SAM a file fits."""

import pytest
import torch
from segment_anything import sam_model_registry

from projects.instance_segment_anything import ARCHS, SegmentAnything, describe_sam
from ptqsam.errors import AssetError, ConfigError
from tests.tiny import ARCH as VIT
from tests.tiny import DECODER

TINY_VIT = dict(
    encoder='tiny_vit',
    embed_dims=(8, 16, 16, 32),
    depths=(1, 1, 1, 1),
    num_heads=(1, 2, 2, 2),
    window_sizes=(4, 4, 4, 2),
    **DECODER,
)


def on_meta(arch):
    with torch.device('meta'):
        return SegmentAnything(arch)


def as_official(state):
    """The inverse of ``from_official`` for the names, written out independently."""
    renamed = {}
    for key, value in state.items():
        parts = key.split('.')
        if parts[1] == 'patch_embed':
            parts[2] = {'conv1': 'seq.0', 'conv2': 'seq.2'}[parts[2]]
        if parts[1] == 'stages':
            parts[1] = 'layers'
            if parts[3] == 'downsample':
                parts[2] = str(int(parts[2]) - 1)
        if parts[-2] == 'conv':
            parts[-2] = 'c'
        renamed['.'.join(parts)] = value
    return renamed


@pytest.mark.parametrize('arch', ['vit_b', 'vit_l', 'vit_h'])
def test_key_layout_is_the_official_one(arch):
    with torch.device('meta'):
        official = sam_model_registry[arch]().state_dict()
    ours = on_meta(arch).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in official.items()}


@pytest.mark.parametrize(('arch', 'millions'), [('vit_b', 93.7), ('vit_l', 312.3), ('vit_h', 641.1), ('mobile', 9.8)])
def test_number_of_parameters(arch, millions):
    model = on_meta(arch)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert [name for name, _ in model.named_children()] == ['image_encoder', 'prompt_encoder', 'mask_decoder']


@pytest.mark.parametrize('arch', [VIT, TINY_VIT])
def test_shapes(arch):
    model = SegmentAnything(arch, image_size=64).eval()
    with torch.no_grad():
        embedding = model.encode(torch.randn(2, 3, 64, 64))
        assert embedding.shape == (2, 16, 4, 4)
        logits, iou = model.decode(embedding[:1], torch.rand(5, 4) * 64, multimask=True)
        assert logits.shape == (5, 3, 16, 16)
        assert iou.shape == (5, 3)
        again, _ = model.decode(embedding[:1], torch.rand(5, 4) * 64, masks=logits[:, :1])
        assert model.postprocess_masks(again, (48, 64), (30, 40)).shape == (5, 1, 30, 40)


@pytest.mark.parametrize('arch', [VIT, TINY_VIT])
def test_checkpoint_round_trip(arch, tmp_path):
    source = SegmentAnything(arch, image_size=64)
    torch.save(source.state_dict(), tmp_path / 'sam.pth')
    model = SegmentAnything(arch, image_size=64, checkpoint=str(tmp_path / 'sam.pth'))
    model.init_weights()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_official_mobile_names_load(tmp_path):
    source = SegmentAnything(TINY_VIT, image_size=64)
    official = as_official(source.state_dict())
    # what the original file holds besides: the classifier, and index tables of some versions
    official['image_encoder.norm_head.weight'] = torch.zeros(32)
    official['image_encoder.head.bias'] = torch.zeros(1000)
    official['image_encoder.layers.1.blocks.0.attn.attention_bias_idxs'] = torch.zeros(16, 16, dtype=torch.long)
    torch.save(official, tmp_path / 'mobile.pt')
    model = SegmentAnything(TINY_VIT, image_size=64)
    model.load_checkpoint(str(tmp_path / 'mobile.pt'))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('key', ['image_encoder.head2.weight', 'image_encoder.layers.1.blocks.0.attn.extra'])
def test_foreign_tensor_is_refused(key, tmp_path):
    state = SegmentAnything(TINY_VIT, image_size=64).state_dict()
    torch.save({**state, key: torch.zeros(1)}, tmp_path / 'sam.pth')
    with pytest.raises(AssetError, match='1 unexpected'):
        SegmentAnything(TINY_VIT, image_size=64).load_checkpoint(str(tmp_path / 'sam.pth'))


def test_missing_tensor_is_refused(tmp_path):
    state = SegmentAnything(VIT, image_size=64).state_dict()
    del state['mask_decoder.iou_token.weight']
    torch.save(state, tmp_path / 'sam.pth')
    with pytest.raises(AssetError, match=r'sam\.pth.*missing.*mask_decoder\.iou_token\.weight'):
        SegmentAnything(VIT, image_size=64).load_checkpoint(str(tmp_path / 'sam.pth'))


@pytest.mark.parametrize('arch', sorted(ARCHS))
def test_every_size_is_recognised(arch):
    assert describe_sam(on_meta(arch).state_dict()) == f"SAM '{arch}'"


def test_mobile_is_recognised_by_official_names():
    assert describe_sam(as_official(on_meta('mobile').state_dict())) == "SAM 'mobile'"


def test_other_sams_and_no_sam_are_recognised():
    assert describe_sam(on_meta(VIT).state_dict()) == 'a SAM ViT of width 32 and depth 2'
    assert describe_sam(on_meta(TINY_VIT).state_dict()) == 'a TinyViT SAM of widths (8, 16, 16, 32)'
    assert describe_sam({'backbone.conv1.weight': torch.zeros(1)}) is None


@pytest.mark.parametrize(
    ('file_arch', 'model_arch', 'says'),
    [
        (
            TINY_VIT,
            VIT,
            'holds a TinyViT SAM of widths (8, 16, 16, 32), but the model is a SAM ViT of width 32 and depth 2',
        ),
        (VIT, TINY_VIT, 'holds a SAM ViT of width 32 and depth 2, but the model is a TinyViT SAM'),
        (VIT, {**VIT, 'depth': 3}, 'depth 2, but the model is a SAM ViT of width 32 and depth 3'),
    ],
)
def test_wrong_size_says_which_sam_the_file_fits(file_arch, model_arch, says, tmp_path):
    path = tmp_path / 'sam.pth'
    torch.save(SegmentAnything(file_arch, image_size=64).state_dict(), path)
    with pytest.raises(AssetError) as error:
        SegmentAnything(model_arch, image_size=64).load_checkpoint(str(path))
    assert says in str(error.value)
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('file_arch', 'model_arch'), [('vit_b', 'vit_l'), ('vit_l', 'vit_h'), ('vit_h', 'vit_b'), ('mobile', 'vit_b')]
)
def test_official_file_of_another_size(file_arch, model_arch, tmp_path):
    official = as_official if file_arch == 'mobile' else dict
    # the right names and shapes, but values that share one number: the file is small
    state = {key: torch.zeros(()).expand(value.shape) for key, value in on_meta(file_arch).state_dict().items()}
    torch.save(official(state), tmp_path / 'sam.pth')
    with pytest.raises(AssetError) as error:
        on_meta(model_arch).load_checkpoint(str(tmp_path / 'sam.pth'))
    assert str(error.value) == (
        f"{tmp_path / 'sam.pth'}: holds SAM '{file_arch}', but the model is SAM '{model_arch}'; "
        f'give the file of that size (`python tools/download.py sam_{model_arch} --root {tmp_path}`), '
        'or change model.sam.arch'
    )


@pytest.mark.parametrize('arch', [VIT, TINY_VIT])
def test_prefix_of_a_parallel_model_is_taken_off_and_told(arch, tmp_path, told):
    state = SegmentAnything(arch, image_size=64).state_dict()
    torch.save({f'module.{key}': value for key, value in state.items()}, tmp_path / 'sam.pth')
    model = SegmentAnything(arch, image_size=64)
    model.load_checkpoint(str(tmp_path / 'sam.pth'))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    (line,) = told
    assert line.startswith(f'{tmp_path / "sam.pth"}: ') and "begin with 'module.'" in line


def test_checkpoint_of_something_else(tmp_path):
    torch.save({'backbone.weight': torch.zeros(1)}, tmp_path / 'resnet.pth')
    with pytest.raises(AssetError, match='holds no SAM weights'):
        SegmentAnything(VIT, image_size=64).load_checkpoint(str(tmp_path / 'resnet.pth'))


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (dict(arch='vit_x'), "'vit_x' is unknown"),
        (dict(arch=dict(embed_dims=32)), "did you mean 'embed_dim'"),
        (dict(arch=dict(encoder='swin')), "'swin' is unknown"),
        (dict(arch={**TINY_VIT, 'depths': (1, 1, 1)}), 'depths=.* must have four entries'),
        (dict(arch=VIT, image_size=100), 'multiple of 16'),
    ],
)
def test_bad_settings(arguments, says):
    with pytest.raises(ConfigError, match=says):
        SegmentAnything(**arguments)
