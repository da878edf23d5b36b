"""Quantizers: values -> at most 2^bits levels, with integer codes. One file per quantizer."""

from ptqsam.quantizers.agq import AGQ
from ptqsam.quantizers.base import Mode, Quantizer
from ptqsam.quantizers.lsq import LSQ
from ptqsam.quantizers.uniform import Uniform

__all__ = ['AGQ', 'LSQ', 'Mode', 'Quantizer', 'Uniform']
