"""Quantize the SAM of a pipeline, evaluate it, report. `python tools/test_quant.py --help`."""

import sys

from ptqsam.cli import main

if __name__ == '__main__':
    sys.exit(main())
