"""Write the Weights & Biases workspace of a sweep, or create it there. `python tools/wandb_dashboard.py --help`."""

import sys

from ptqsam.report.wandb_dashboard import main

if __name__ == '__main__':
    sys.exit(main())
