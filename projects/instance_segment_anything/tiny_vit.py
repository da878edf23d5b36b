"""MobileSAM's image encoder: TinyViT from timm's blocks, and the key map of the official ``mobile_sam.pt``."""

import re
from collections.abc import Sequence

from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import Attention, ConvLayer, PatchEmbed, PatchMerging, TinyVitStage
from torch import Tensor, nn

# Official name -> timm name, applied in order. The original hangs a patch merging at the end of a stage, timm at the
# beginning of the next one; the rest is spelling.
_RENAMES = (
    (re.compile(r'^image_encoder\.patch_embed\.seq\.0\.'), 'image_encoder.patch_embed.conv1.'),
    (re.compile(r'^image_encoder\.patch_embed\.seq\.2\.'), 'image_encoder.patch_embed.conv2.'),
    (
        re.compile(r'^image_encoder\.layers\.(\d+)\.downsample\.'),
        lambda match: f'image_encoder.stages.{int(match[1]) + 1}.downsample.',
    ),
    (re.compile(r'^image_encoder\.layers\.(\d+)\.'), r'image_encoder.stages.\1.'),
    (re.compile(r'^(image_encoder\.(?:patch_embed|stages)\..*)\.c\.weight$'), r'\1.conv.weight'),
)
# The only tensors of the official file that segmentation does not use: TinyViT's ImageNet classifier, and index
# tables that the blocks compute themselves.
UNUSED_KEYS = (
    r'image_encoder\.(norm_head|head)\.(weight|bias)',
    r'image_encoder\.layers\.\d+\.blocks\.\d+\.attn\.attention_bias_idxs',
)


class TinyViTEncoder(nn.Module):
    """TinyViT with the neck of SAM; the classifier is left out and the last patch merging keeps the resolution.

    The blocks are timm's own classes, so that quantization can replace them by class. Their attention runs in the
    explicit form (``fused_attn = False``): the quantized model needs q, k, the softmax and v as separate tensors, and
    the floating-point model must be the same arithmetic.

    Args:
        embed_dims: channels of the four stages.
        depths: blocks per stage.
        num_heads: attention heads per stage (the first stage is convolutional and ignores its number).
        window_sizes: attention window per stage, in tokens of that stage.
        mlp_ratio: hidden channels of the MLP over channels of the block.
        out_chans: channels of the image embedding.

    Source: Zhang et al., "Faster Segment Anything" (MobileSAM), arXiv:2306.14289, and its released weights.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 160, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (2, 4, 5, 10),
        window_sizes: Sequence[int] = (7, 7, 14, 7),
        mlp_ratio: float = 4.0,
        out_chans: int = 256,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(3, embed_dims[0], act_layer=nn.GELU)
        self.stages = nn.Sequential(ConvLayer(embed_dims[0], depths[0], act_layer=nn.GELU))
        for index in range(1, len(embed_dims)):
            self.stages.append(
                TinyVitStage(
                    embed_dims[index - 1],
                    embed_dims[index],
                    depths[index],
                    num_heads[index],
                    window_sizes[index],
                    mlp_ratio=mlp_ratio,
                    downsample=PatchMerging,
                    act_layer=nn.GELU,
                )
            )
        self.stages[-1].downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dims[-1], out_chans, kernel_size=1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )
        for module in self.modules():
            if isinstance(module, Attention):
                module.fused_attn = False
                module.register_load_state_dict_post_hook(_forget_bias_table)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: (B, 3, S, S), normalised and padded.

        Returns:
            (B, out_chans, S / 16, S / 16).
        """
        return self.neck(self.stages(self.patch_embed(images)))


def _forget_bias_table(module: nn.Module, _incompatible_keys: object) -> None:
    """timm's attention keeps its bias table once it ran in eval mode; new weights need a new table."""
    module.attention_bias_cache = {}


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an official MobileSAM file to the names of ``SegmentAnything('mobile')``.

    Args:
        state: the official file; names that are already ours, or unknown, pass unchanged.

    Returns:
        A new dict without the tensors of ``UNUSED_KEYS``. Nothing else is dropped, so a strict load stays strict.
    """
    renamed = {}
    for key, value in state.items():
        if any(re.fullmatch(pattern, key) for pattern in UNUSED_KEYS):
            continue
        for pattern, replacement in _RENAMES:
            key = pattern.sub(replacement, key)
        renamed[key] = value
    return renamed
