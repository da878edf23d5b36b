"""What a run leaves for people: tables, pictures, plots, dashboards."""

from ptqsam.report.gallery import Gallery
from ptqsam.report.plots import plot_quantization_errors
from ptqsam.report.reconstruction import plot_outcomes, write_outcomes
from ptqsam.report.summary import result_table, rule_table, write_summary
from ptqsam.report.wandb_report import WandbReport

__all__ = [
    'Gallery',
    'WandbReport',
    'plot_outcomes',
    'plot_quantization_errors',
    'result_table',
    'rule_table',
    'write_outcomes',
    'write_summary',
]
