"""Say what a run needs, what of it is missing, and how to get it. `python tools/check_setup.py --help`."""

import sys

from ptqsam.check_setup import main

if __name__ == '__main__':
    sys.exit(main())
