"""What a run leaves for people: tables, pictures, dashboards."""

from ptqsam.report.gallery import Gallery
from ptqsam.report.summary import result_table, rule_table, write_summary

__all__ = ['Gallery', 'result_table', 'rule_table', 'write_summary']
