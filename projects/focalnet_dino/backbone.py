"""FocalNet as a backbone of mmdet: timm's network, and what detectors add to it."""

import timm
from mmdet.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from projects.detr_common import Rule

_PATCH = 4


@MODELS.register_module()
class FocalNet(nn.Module):
    """Focal modulation network (Yang et al., NeurIPS 2022) whose four feature maps are normalised one by one.

    Around timm's network: the input is padded with zeros, right and bottom, to a multiple of the patch size (timm's
    stem would leave the last rows and columns out), and each output has a LayerNorm over its channels. The modulation
    averages over the whole map, padding of a batch included: use batches of one image.

    Args:
        variant: name of the network in timm.
    """

    def __init__(self, variant: str = 'focalnet_large_fl4') -> None:
        super().__init__()
        # what detection checkpoints were trained with; timm leaves the modulator as it is by default
        options = dict(features_only=True, out_indices=(0, 1, 2, 3), normalize_modulator=True)
        self.body = timm.create_model(variant, pretrained=False, **options)
        self.norms = nn.ModuleList(LayerNorm2d(width, eps=1e-5) for width in self.body.feature_info.channels())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of strides 4, 8, 16 and 32.

        Args:
            images: (batch, 3, height, width), normalised.

        Returns:
            Four tensors (batch, channels, height / stride, width / stride); the large variants round sizes up.
        """
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % _PATCH, 0, -height % _PATCH))
        return tuple(norm(level) for norm, level in zip(self.norms, self.body(padded), strict=True))


def _as_convolution(weight: Tensor) -> Tensor:
    """A linear map of channels as the 1x1 convolution that timm has in its place."""
    return weight[:, :, None, None] if weight.ndim == 2 else weight


_BODY = r'^backbone\.0\.'
_BLOCK = _BODY + r'layers\.(\d)\.(blocks\.\d+)\.'
_STAGE = r'backbone.body.layers_\1.'
FOCALNET = (
    Rule(_BODY + r'patch_embed\.(proj|norm)\.', r'backbone.body.stem.\1.'),
    # timm reduces at the beginning of a stage, the original at the end of the one before
    *(
        Rule(_BODY + rf'layers\.{i}\.downsample\.(proj|norm)\.', rf'backbone.body.layers_{i + 1}.downsample.\1.')
        for i in range(3)
    ),
    Rule(_BLOCK + r'(norm[12])\.', _STAGE + r'\2.\3_post.'),
    Rule(_BLOCK + r'gamma_([12])$', _STAGE + r'\2.ls\3.gamma'),
    Rule(_BLOCK + r'(modulation\.(?:f|proj)|mlp\.fc[12])\.', _STAGE + r'\2.\3.', _as_convolution),
    Rule(_BLOCK + r'(modulation\.(?:h|focal_layers)\.)', _STAGE + r'\2.\3'),
    Rule(_BODY + r'norm([0-3])\.', r'backbone.norms.\1.'),
)
