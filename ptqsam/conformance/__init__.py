"""Numbers that runs have to keep, as data: `exp/conformance.yaml`, checked by `tools/conformance.py`."""

from ptqsam.conformance.expectations import Entry, Expectation, Suite, load_suite, select

__all__ = ['Entry', 'Expectation', 'Suite', 'load_suite', 'select']
