"""Get official checkpoints: python tools/download.py NAME... [--root DIR] [--verify] | --list."""

import argparse
import sys

from ptqsam.download import CHECKPOINTS, checkpoint_root, fetch, find_checkpoint
from ptqsam.errors import PTQSAMError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Fetch official checkpoints and check that they are whole.')
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'one or more of: {", ".join(CHECKPOINTS)}')
    parser.add_argument('--root', metavar='DIR', help='folder to fill (default: $PTQSAM_CKPT, else ckpt)')
    parser.add_argument('--verify', action='store_true', help='hash files that are already there, too')
    parser.add_argument('--list', action='store_true', help='print the table of checkpoints and what is present')
    args = parser.parse_args()
    if not args.names and not args.list:
        parser.error('name at least one checkpoint, or use --list')
    return args


def print_table(root: str | None, verify: bool) -> None:
    row = '{:<16} {:>13}  {:<73} {}'
    print(row.format('name', 'bytes', 'file', f'present in {checkpoint_root(root)}'))
    for checkpoint in CHECKPOINTS.values():
        size = f'{checkpoint.size:,}' if checkpoint.size else '?'
        print(row.format(checkpoint.name, size, checkpoint.file_name, checkpoint.status(root, verify)))


def main() -> int:
    args = parse_args()
    exit_code = 0
    try:
        for name in args.names:
            find_checkpoint(name)  # a misspelt last name must not wait for the first download
        for name in args.names:
            try:
                print(fetch(name, args.root, verify=args.verify))
            except PTQSAMError as error:  # the other names may still succeed
                print(f'error: {error}', file=sys.stderr)
                exit_code = max(exit_code, error.exit_code)
        if args.list:
            print_table(args.root, args.verify)
    except PTQSAMError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print('interrupted; what came is kept, the same command goes on from there', file=sys.stderr)
        return 130
    return exit_code


if __name__ == '__main__':
    sys.exit(main())
