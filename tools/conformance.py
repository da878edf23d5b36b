"""Check that runs still give the numbers of exp/conformance.yaml. `python tools/conformance.py --help`."""

import sys
from pathlib import Path

from ptqsam.conformance.cli import main

if __name__ == '__main__':
    sys.exit(main(Path(__file__).resolve().parent))
