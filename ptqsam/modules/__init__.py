"""Quantized replacements of modules, registered by the class they replace."""

from ptqsam.modules.base import Build, PassThrough, QuantModule, child_role
from ptqsam.modules.mlp import QuantMLP
from ptqsam.modules.ops import QuantConv2d, QuantConvTranspose2d, QuantLinear, QuantNorm, QuantOp
from ptqsam.modules.sam_decoder_attention import QuantDecoderAttention
from ptqsam.modules.sam_encoder_attention import QuantEncoderAttention
from ptqsam.modules.tiny_vit_attention import QuantTinyViTAttention

__all__ = [
    'Build',
    'PassThrough',
    'QuantConv2d',
    'QuantConvTranspose2d',
    'QuantDecoderAttention',
    'QuantEncoderAttention',
    'QuantLinear',
    'QuantMLP',
    'QuantModule',
    'QuantNorm',
    'QuantOp',
    'QuantTinyViTAttention',
    'child_role',
]
