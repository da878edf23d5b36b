"""Sweeps: a grid of runs as one command. Cells, their ledger, and engines that run them."""

from ptqsam.sweep.records import Record, is_sweep, read_records

__all__ = ['Record', 'is_sweep', 'read_records']
