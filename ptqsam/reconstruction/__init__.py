"""Reconstruction: unit by unit, learn the rounding of weights and the scales of activations. Methods.md 1.5."""

from ptqsam.reconstruction.losses import SquaredError

__all__ = ['SquaredError']
