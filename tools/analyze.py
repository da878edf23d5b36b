"""Which quantizer of a recipe costs what, and why. `python tools/analyze.py --help`."""

import sys

from ptqsam.analysis.command import main

if __name__ == '__main__':
    sys.exit(main())
