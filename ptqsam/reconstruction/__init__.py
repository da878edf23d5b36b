"""Reconstruction: unit by unit, learn the rounding of weights and the scales of activations. Methods.md 1.5."""

from ptqsam.reconstruction.losses import PromptAware, SquaredError

__all__ = ['PromptAware', 'SquaredError']
