"""Solver hooks: published ideas that act at a stage of the loop. One file per idea."""

from ptqsam.hooks.bimodal_integration import BimodalIntegration
from ptqsam.hooks.condition_number import CondiQuant, ConditionNumberReduction
from ptqsam.hooks.perceptual_clipping import PerceptualClipping
from ptqsam.hooks.scale_reparameterization import ScaleReparameterization

__all__ = [
    'BimodalIntegration',
    'CondiQuant',
    'ConditionNumberReduction',
    'PerceptualClipping',
    'ScaleReparameterization',
]
