"""Choose bits layer by layer under a budget and write them as a recipe. `python tools/allocate_bits.py --help`."""

import sys

from ptqsam.mixed.tool import main

if __name__ == '__main__':
    sys.exit(main())
