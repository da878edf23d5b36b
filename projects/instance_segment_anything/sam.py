"""SAM as one plain module: image encoder, prompt encoder, mask decoder, and how to know a checkpoint's size."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from mmdet.registry import MODELS
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from ptqsam.download import CHECKPOINTS, fetch_command
from ptqsam.errors import AssetError, ConfigError
from ptqsam.weights import load_state_dict_strict, load_weights

from .checks import check_kind, checked_arguments, reject_unknown
from .tiny_vit import TinyViTEncoder, from_official

# name -> settings; each entry is also what a user may write as a dict for an own SAM
ARCHS: dict[str, dict[str, Any]] = {
    'vit_b': dict(embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11)),
    'vit_l': dict(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23)),
    'vit_h': dict(embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31)),
    'mobile': dict(
        encoder='tiny_vit',
        embed_dims=(64, 128, 160, 320),
        depths=(2, 2, 6, 2),
        num_heads=(2, 4, 5, 10),
        window_sizes=(7, 7, 14, 7),
    ),
}
_VIT_DEFAULTS = dict(
    embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11), window_size=14, mlp_ratio=4.0
)
_TINY_VIT_DEFAULTS = dict(ARCHS['mobile'], mlp_ratio=4.0)
_COMMON_DEFAULTS = dict(
    encoder='vit',
    out_chans=256,
    decoder_depth=2,
    decoder_num_heads=8,
    decoder_mlp_dim=2048,
    iou_head_hidden_dim=256,
)
_PATCH_SIZE = 16  # of the ViT, and the total stride of TinyViT


@MODELS.register_module()
@checked_arguments('model.sam')
class SegmentAnything(nn.Module):
    """Segment Anything v1 with box and mask prompts. A plain module: no framework inside.

    Args:
        arch: a name of ``ARCHS`` or a dict of settings for an own SAM: ``encoder`` ('vit' or 'tiny_vit'), the settings
            of that encoder as in ``ARCHS`` (and ``window_size``, ``mlp_ratio``), ``out_chans`` (channels of the image
            embedding and of the prompts), ``decoder_depth``, ``decoder_num_heads``, ``decoder_mlp_dim``,
            ``iou_head_hidden_dim``. What is left out is as in SAM ViT-B or MobileSAM.
        image_size: side of the padded input in pixels, a multiple of 16.
        checkpoint: file with the official key layout; read by ``init_weights()``, not here, so that a model can be
            built without its weights (on the meta device, too).

    Raises:
        ConfigError: unknown architecture or setting, or a setting of the wrong kind.

    Source: Kirillov et al., "Segment Anything", arXiv:2304.02643; modules of the ``segment-anything`` package.
    """

    mask_threshold = 0.0

    def __init__(
        self, arch: str | Mapping[str, Any] = 'vit_b', image_size: int = 1024, checkpoint: str | None = None
    ) -> None:
        super().__init__()
        settings = _resolve_arch(arch)
        check_kind('model.sam.image_size', image_size, 1024)
        if image_size < _PATCH_SIZE or image_size % _PATCH_SIZE:
            raise ConfigError(f'model.sam.image_size={image_size} is no multiple of {_PATCH_SIZE}; use 1024')
        if not isinstance(checkpoint, str | None):
            raise ConfigError(f'model.sam.checkpoint={checkpoint!r} must be a path')
        self.image_size = image_size
        self.checkpoint = checkpoint
        dim, grid = settings['out_chans'], image_size // _PATCH_SIZE
        self.image_encoder = _build_encoder(settings, image_size)
        self.prompt_encoder = PromptEncoder(dim, (grid, grid), (image_size, image_size), mask_in_chans=16)
        self.mask_decoder = MaskDecoder(
            transformer_dim=dim,
            transformer=TwoWayTransformer(
                depth=settings['decoder_depth'],
                embedding_dim=dim,
                num_heads=settings['decoder_num_heads'],
                mlp_dim=settings['decoder_mlp_dim'],
            ),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=settings['iou_head_hidden_dim'],
        )

    def encode(self, images: Tensor) -> Tensor:
        """Embed normalised, padded images (B, 3, S, S) as (B, C, S / 16, S / 16)."""
        return self.image_encoder(images)

    def decode(
        self, embedding: Tensor, boxes: Tensor, masks: Tensor | None = None, multimask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Predict masks for the boxes of one image.

        Args:
            embedding: (1, C, S / 16, S / 16), from ``encode``.
            boxes: (N, 4), corners xyxy in pixels of the resized image.
            masks: (N, 1, S / 4, S / 4) logits of an earlier prediction, as an additional prompt.
            multimask: three masks per box instead of one.

        Returns:
            Logits (N, M, S / 4, S / 4) and predicted IoU (N, M), where M is 3 or 1.
        """
        sparse, dense = self.prompt_encoder(points=None, boxes=boxes, masks=masks)
        return self.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )

    def postprocess_masks(self, masks: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
        """Bring logits to the original image: scale to the padded input, cut the padding off, scale again.

        Args:
            masks: (N, M, S / 4, S / 4) logits.
            input_size: height and width of the resized image before padding.
            original_size: height and width of the original image.

        Returns:
            (N, M, H, W) logits; positive is mask.
        """
        masks = F.interpolate(masks, (self.image_size, self.image_size), mode='bilinear', align_corners=False)
        masks = masks[..., : input_size[0], : input_size[1]]
        return F.interpolate(masks, original_size, mode='bilinear', align_corners=False)

    def init_weights(self) -> None:
        """Load ``checkpoint`` if one was given."""
        if self.checkpoint is not None:
            self.load_checkpoint(self.checkpoint)

    def load_checkpoint(self, path: str) -> None:
        """Load a checkpoint strictly: every tensor of the model from the file, every tensor of the file used.

        Args:
            path: official SAM or MobileSAM file, or a state dict saved from this module.

        Raises:
            AssetError: missing, damaged or unsafe file, or weights of another SAM (the message says which).
        """
        state = load_weights(path)
        found, expected = describe_sam(state), describe_sam(self.state_dict())
        if found != expected:
            raise AssetError(
                f'{path}: holds {found or "no SAM weights"}, but the model is {expected}; '
                f'give the file of that size{_command(expected, path)}, or change model.sam.arch'
            )
        load_state_dict_strict(self, from_official(state), source=str(path))


def _command(described: str | None, path: str) -> str:
    """' (`command`)' that fetches the official weights of a model into the folder of a path, or ''."""
    name = next((name for name in ARCHS if described == f"SAM '{name}'"), None)
    if name is None:
        return ''
    known = CHECKPOINTS['mobile_sam' if name == 'mobile' else f'sam_{name}']
    return f' (`{fetch_command(Path(path).with_name(known.file_name))}`)'


def describe_sam(state: Mapping[str, Tensor]) -> str | None:
    """Say which SAM a state dict belongs to.

    Args:
        state: a state dict, official names or ours.

    Returns:
        For example "SAM 'vit_b'", "SAM 'mobile'", "a SAM ViT of width 32 and depth 2"; None when it is no SAM.
    """
    if not any(key.startswith('mask_decoder.') for key in state):
        return None
    if any(re.match(r'image_encoder\.(layers|stages)\.', key) for key in state):
        widths = tuple(
            int(value.shape[0]) for key, value in from_official(state).items() if re.fullmatch(_STAGE_WIDTH, key)
        )
        return "SAM 'mobile'" if widths == ARCHS['mobile']['embed_dims'] else f'a TinyViT SAM of widths {widths}'
    patches = state.get('image_encoder.patch_embed.proj.weight')
    if patches is None:
        return None
    width = int(patches.shape[0])
    depth = len({key.split('.')[2] for key in state if key.startswith('image_encoder.blocks.')})
    for name, settings in ARCHS.items():
        if (settings.get('embed_dim'), settings.get('depth')) == (width, depth):
            return f"SAM '{name}'"
    return f'a SAM ViT of width {width} and depth {depth}'


_STAGE_WIDTH = r'image_encoder\.stages\.\d+\.(downsample|blocks\.0)\.conv3\.conv\.weight'


def _resolve_arch(arch: str | Mapping[str, Any]) -> dict[str, Any]:
    """Complete a name or a partial dict to all settings; refuse what is not a setting."""
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ConfigError(f"model.sam.arch='{arch}' is unknown; choose one of {sorted(ARCHS)} or give a dict")
        arch = ARCHS[arch]
    elif not isinstance(arch, Mapping):
        raise ConfigError(f'model.sam.arch={arch!r} must be one of {sorted(ARCHS)} or a dict of settings')
    encoders = {'vit': _VIT_DEFAULTS, 'tiny_vit': _TINY_VIT_DEFAULTS}
    encoder = arch.get('encoder', 'vit')
    if encoder not in encoders:
        raise ConfigError(f"model.sam.arch.encoder='{encoder}' is unknown; choose one of {sorted(encoders)}")
    defaults = {**_COMMON_DEFAULTS, **encoders[encoder]}
    reject_unknown('model.sam.arch', arch, defaults)
    settings = {**defaults, **arch}
    for key, value in settings.items():
        check_kind(f'model.sam.arch.{key}', value, defaults[key])
    if encoder == 'tiny_vit':
        for key in ('embed_dims', 'depths', 'num_heads', 'window_sizes'):
            if len(settings[key]) != 4:
                raise ConfigError(f'model.sam.arch.{key}={settings[key]} must have four entries, one per stage')
    return settings


def _build_encoder(settings: dict[str, Any], image_size: int) -> nn.Module:
    if settings['encoder'] == 'tiny_vit':
        return TinyViTEncoder(**{key: settings[key] for key in (*_TINY_VIT_DEFAULTS, 'out_chans') if key != 'encoder'})
    return ImageEncoderViT(
        img_size=image_size,
        patch_size=_PATCH_SIZE,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        qkv_bias=True,
        use_rel_pos=True,
        **{key: settings[key] for key in (*_VIT_DEFAULTS, 'out_chans')},
    )
