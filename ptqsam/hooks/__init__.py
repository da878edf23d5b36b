"""Solver hooks: published ideas that act at a stage of the loop. One file per idea."""

from ptqsam.hooks.bimodal_integration import BimodalIntegration

__all__ = ['BimodalIntegration']
