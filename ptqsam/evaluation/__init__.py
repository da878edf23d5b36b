"""Metrics that mmdet lacks."""

from ptqsam.evaluation.quantization_error import QuantizationError, measure_quantization_error

__all__ = ['QuantizationError', 'measure_quantization_error']
