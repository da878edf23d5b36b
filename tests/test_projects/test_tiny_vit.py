"""MobileSAM's encoder: the official file to the last tensor, and timm's cached bias tables."""

import torch
from timm.models import tiny_vit

from projects.instance_segment_anything import SegmentAnything, TinyViTEncoder
from projects.instance_segment_anything.tiny_vit import from_official
from ptqsam.weights import load_weights

SMALL = dict(
    embed_dims=(8, 16, 16, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), window_sizes=(4, 4, 4, 2), out_chans=8
)


def test_official_file_is_used_to_the_last_tensor(assets):
    path = assets / 'ckpt' / 'mobile_sam.pt'
    official = load_weights(path)
    model = SegmentAnything('mobile')
    model.load_checkpoint(str(path))
    unused = {key for key in official if not from_official({key: official[key]})}
    assert unused == {f'image_encoder.{layer}.{kind}' for layer in ('norm_head', 'head') for kind in ('weight', 'bias')}
    ours = model.state_dict()
    assert len(official) == 439
    assert len(ours) == 435
    assert sum(value.double().sum() for value in ours.values()) == sum(
        value.double().sum() for key, value in official.items() if key not in unused
    )


def test_layout():
    with torch.device('meta'):
        encoder = TinyViTEncoder()
    blocks = [module for module in encoder.modules() if isinstance(module, tiny_vit.TinyVitBlock)]
    assert [(block.dim, block.num_heads, block.window_size) for block in blocks] == (
        [(128, 4, 7)] * 2 + [(160, 5, 14)] * 6 + [(320, 10, 7)] * 2
    )
    strides = [stage.downsample.conv2.conv.stride for stage in encoder.stages[1:]]
    assert strides == [(2, 2), (2, 2), (1, 1)]
    assert encoder(torch.empty(1, 3, 1024, 1024, device='meta')).shape == (1, 256, 64, 64)


def test_blocks_are_of_timms_classes():
    kinds = {type(module) for module in TinyViTEncoder(**SMALL).modules()}
    assert {tiny_vit.Attention, tiny_vit.NormMlp, tiny_vit.MBConv, tiny_vit.PatchMerging, tiny_vit.ConvNorm} <= kinds


def test_new_weights_reach_a_model_that_ran_in_eval_mode():
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 64)
    used, fresh, source = (TinyViTEncoder(**SMALL).eval() for _ in range(3))
    for name, parameter in source.named_parameters():
        if name.endswith('attention_biases'):
            torch.nn.init.normal_(parameter, std=3)
    with torch.no_grad():
        used(images)  # fills timm's table
        used.load_state_dict(source.state_dict())
        fresh.load_state_dict(source.state_dict())
        assert torch.equal(used(images), fresh(images))
        assert torch.equal(used(images), source(images))
