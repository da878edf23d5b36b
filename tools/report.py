"""One HTML page about a run or a sweep. `python tools/report.py --help`."""

import sys

from ptqsam.report.page.tool import main

if __name__ == '__main__':
    sys.exit(main())
