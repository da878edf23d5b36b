"""Names and shapes of the tensors in official detector files, from the structure of the networks.

Where conformance data exist, they are compared with the manifests of the files.
"""

from itertools import pairwise
from typing import TypeAlias

import torch
from torchvision.models import resnet50

Layout: TypeAlias = dict[str, tuple[int, ...]]
WIDTH, LAYERS, CLASSES = 256, 6, 91


def hdetr_r50() -> Layout:
    """H-Deformable-DETR with ResNet-50."""
    with torch.device('meta'):
        tensors = resnet50(weights=None).state_dict()
    used = {name: tuple(value.shape) for name, value in tensors.items() if not name.startswith('fc.')}
    backbone = {f'backbone.0.body.{name}': shape for name, shape in used.items() if 'num_batches' not in name}
    return backbone | _hdetr((512, 1024, 2048), queries=300)


def hdetr_swin(width: int, depths: tuple[int, ...], heads: int, queries: int = 300) -> Layout:
    """H-Deformable-DETR with a Swin Transformer."""
    return swin(width, depths, heads) | _hdetr((2 * width, 4 * width, 8 * width), queries)


def dino_focalnet() -> Layout:
    """DINO with five scales and FocalNet-L of four focal levels."""
    layout = _focalnet(192, (2, 2, 18, 2)) | _transformer(levels=5) | _projections((192, 384, 768, 1536))
    layout |= _heads('', LAYERS) | _heads('transformer.decoder.', LAYERS) | _norm('transformer.decoder.norm', WIDTH)
    layout |= _maps('transformer.decoder.ref_point_head.layers', 2 * WIDTH, WIDTH, WIDTH)
    layout |= _maps('transformer.enc_out_bbox_embed.layers', WIDTH, WIDTH, WIDTH, 4)
    layout |= _map('transformer.enc_out_class_embed', WIDTH, CLASSES)
    return layout | {'transformer.tgt_embed.weight': (900, WIDTH), 'label_enc.weight': (CLASSES + 1, WIDTH)}


def swin(width: int, depths: tuple[int, ...], heads: int, window: int = 7) -> Layout:
    """The original Swin Transformer for detection, of which stages 1 to 3 are used."""
    body = 'backbone.0.body.'
    layout = {f'{body}patch_embed.proj.weight': (width, 3, 4, 4), f'{body}patch_embed.proj.bias': (width,)}
    layout |= _norm(f'{body}patch_embed.norm', width)
    for i, depth in enumerate(depths):
        size, stage = width << i, f'{body}layers.{i}.'
        for block in (f'{stage}blocks.{j}.' for j in range(depth)):
            layout[f'{block}attn.relative_position_bias_table'] = ((2 * window - 1) ** 2, heads << i)
            layout[f'{block}attn.relative_position_index'] = (window**2, window**2)
            layout |= _map(f'{block}attn.qkv', size, 3 * size) | _map(f'{block}attn.proj', size, size)
            layout |= _map(f'{block}mlp.fc1', size, 4 * size) | _map(f'{block}mlp.fc2', 4 * size, size)
            layout |= _norm(f'{block}norm1', size) | _norm(f'{block}norm2', size)
        if i < 3:
            layout[f'{stage}downsample.reduction.weight'] = (2 * size, 4 * size)
            layout |= _norm(f'{stage}downsample.norm', 4 * size)
        if i > 0:
            layout |= _norm(f'{body}norm{i}', size)
    return layout


def _focalnet(width: int, depths: tuple[int, ...], levels: int = 4) -> Layout:
    layout = {'backbone.0.patch_embed.proj.weight': (width, 3, 7, 7), 'backbone.0.patch_embed.proj.bias': (width,)}
    layout |= _norm('backbone.0.patch_embed.norm', width)
    for i, depth in enumerate(depths):
        size, stage = width << i, f'backbone.0.layers.{i}.'
        for block in (f'{stage}blocks.{j}.' for j in range(depth)):
            layout |= {f'{block}gamma_1': (size,), f'{block}gamma_2': (size,)}
            layout |= _norm(f'{block}norm1', size) | _norm(f'{block}norm2', size)
            layout |= _map(f'{block}mlp.fc1', size, 4 * size) | _map(f'{block}mlp.fc2', 4 * size, size)
            # queries, context, and a gate for each level and for the whole image
            layout |= _map(f'{block}modulation.f', size, 2 * size + levels + 1)
            layout |= _map(f'{block}modulation.proj', size, size) | _map(f'{block}modulation.h', size, size, (1, 1))
            for k in range(levels):
                layout[f'{block}modulation.focal_layers.{k}.0.weight'] = (size, 1, 3 + 2 * k, 3 + 2 * k)
        if i < 3:
            layout |= _map(f'{stage}downsample.proj', size, 2 * size, (3, 3))
            layout |= _norm(f'{stage}downsample.norm', 2 * size)
        layout |= _norm(f'backbone.0.norm{i}', size)
    return layout


def _hdetr(channels: tuple[int, ...], queries: int) -> Layout:
    """All but the backbone; 1500 queries of the one-to-many branch come on top."""
    layout = _transformer(levels=4) | _projections(channels) | {'query_embed.weight': (queries + 1500, WIDTH)}
    layout |= _heads('', LAYERS + 1) | _heads('transformer.decoder.', LAYERS + 1)
    return layout | _map('transformer.pos_trans', 2 * WIDTH, 2 * WIDTH) | _norm('transformer.pos_trans_norm', 2 * WIDTH)


def _transformer(levels: int, heads: int = 8, points: int = 4, hidden: int = 2048) -> Layout:
    samples = heads * levels * points
    layout = {'transformer.level_embed': (levels, WIDTH)}
    layout |= _map('transformer.enc_output', WIDTH, WIDTH) | _norm('transformer.enc_output_norm', WIDTH)
    for kind, attention, norms in (('encoder', 'self_attn', 2), ('decoder', 'cross_attn', 3)):
        for layer in (f'transformer.{kind}.layers.{i}.' for i in range(LAYERS)):
            layout |= _map(f'{layer}{attention}.sampling_offsets', WIDTH, 2 * samples)
            layout |= _map(f'{layer}{attention}.attention_weights', WIDTH, samples)
            for name in ('value_proj', 'output_proj'):
                layout |= _map(f'{layer}{attention}.{name}', WIDTH, WIDTH)
            layout |= _map(f'{layer}linear1', WIDTH, hidden) | _map(f'{layer}linear2', hidden, WIDTH)
            for i in range(norms):
                layout |= _norm(f'{layer}norm{i + 1}', WIDTH)
            if kind == 'decoder':
                layout[f'{layer}self_attn.in_proj_weight'] = (3 * WIDTH, WIDTH)
                layout[f'{layer}self_attn.in_proj_bias'] = (3 * WIDTH,)
                layout |= _map(f'{layer}self_attn.out_proj', WIDTH, WIDTH)
    return layout


def _projections(channels: tuple[int, ...]) -> Layout:
    """To the transformer's width; a strided one on top makes one more scale."""
    maps = [(inputs, (1, 1)) for inputs in channels]
    layout: Layout = {}
    for i, (inputs, kernel) in enumerate([*maps, (channels[-1], (3, 3))]):
        layout |= _map(f'input_proj.{i}.0', inputs, WIDTH, kernel) | _norm(f'input_proj.{i}.1', WIDTH)
    return layout


def _heads(prefix: str, count: int) -> Layout:
    layout: Layout = {}
    for i in range(count):
        layout |= _map(f'{prefix}class_embed.{i}', WIDTH, CLASSES)
        layout |= _maps(f'{prefix}bbox_embed.{i}.layers', WIDTH, WIDTH, WIDTH, 4)
    return layout


def _map(name: str, inputs: int, outputs: int, kernel: tuple[int, ...] = ()) -> Layout:
    """A linear map, or a convolution."""
    return {f'{name}.weight': (outputs, inputs, *kernel), f'{name}.bias': (outputs,)}


def _maps(name: str, *widths: int) -> Layout:
    layout: Layout = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        layout |= _map(f'{name}.{i}', inputs, outputs)
    return layout


def _norm(name: str, width: int) -> Layout:
    return {f'{name}.weight': (width,), f'{name}.bias': (width,)}
