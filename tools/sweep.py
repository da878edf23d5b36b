"""Run a grid of pipelines, recipes, bits and seeds. `python tools/sweep.py --help`."""

import sys

from ptqsam.sweep.cli import main

if __name__ == '__main__':
    sys.exit(main())
