"""`python -m ptqsam`: the main job, as `tools/test_quant.py`."""

import sys

from ptqsam.cli import main

if __name__ == '__main__':
    sys.exit(main())
