"""Get official checkpoints and COCO: python tools/download.py NAME... | coco [--subset N] | --list."""

import argparse
import sys
from collections.abc import Callable

from ptqsam.coco_files import ARCHIVES, coco_root, fetch_archives
from ptqsam.coco_images import fetch_subset
from ptqsam.download import CHECKPOINTS, checkpoint_root, fetch, find_checkpoint
from ptqsam.errors import PTQSAMError

OTHERS = ('coco', *ARCHIVES)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Fetch official checkpoints and COCO 2017, and check them.')
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'any of: {", ".join([*CHECKPOINTS, *OTHERS])}')
    parser.add_argument('--root', metavar='DIR', help='folder for checkpoints (default: $PTQSAM_CKPT, else ckpt)')
    parser.add_argument('--data', metavar='DIR', help='folder for coco/ (default: $PTQSAM_DATA, else data)')
    parser.add_argument('--verify', action='store_true', help='hash checkpoints that are already there, too')
    parser.add_argument('--list', action='store_true', help='print what is known and what is present')
    parser.add_argument('--keep-archives', action='store_true', help='keep the archives of COCO after unpacking')
    group = parser.add_argument_group('coco --subset', 'annotations, and only the images of a run with --limit N')
    group.add_argument('--subset', type=number, metavar='N', help='the first N images of val2017; may be 0')
    group.add_argument('--num-images', type=number, default=32, metavar='N', help='calibration.num_images (32)')
    group.add_argument('--seed', type=number, default=0, metavar='N', help='calibration.seed (0)')
    group.add_argument('--first-images', action='store_true', help='as compat.first_images')
    args = parser.parse_args()
    if not args.names and not args.list:
        parser.error('name at least one checkpoint or coco, or use --list')
    if args.subset is not None and 'coco' not in args.names:
        parser.error('--subset goes with the name coco')
    if args.root and args.names and not set(args.names) - set(OTHERS):
        parser.error('--root is for checkpoints; the folder for coco/ is --data')
    return args


def number(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} must be a whole number')
    return int(text)


def jobs(args: argparse.Namespace) -> list[Callable[[], None]]:
    """What is to be done, each on its own: others may still succeed when one fails."""
    todo: list[Callable[[], None]] = []
    parts = [name for name in args.names if name in ARCHIVES]
    for name in args.names:
        if name not in OTHERS:
            find_checkpoint(name, OTHERS)  # a misspelt last name must not wait for the first download
            todo.append(lambda name=name: print(fetch(name, args.root, verify=args.verify)))
        elif name == 'coco' and args.subset is None:
            parts = list(ARCHIVES)
    if parts:
        todo.append(lambda: archives(parts, args))
    if args.subset is not None:
        todo.append(lambda: subset(args))
    return todo


def archives(names: list[str], args: argparse.Namespace) -> None:
    """Fetch folders of COCO as wholes."""
    for folder in fetch_archives(names, args.data, keep_archives=args.keep_archives):
        print(folder, flush=True)


def subset(args: argparse.Namespace) -> None:
    """Fetch what a run with --limit needs, and say what that is."""
    found = fetch_subset(args.data, args.subset, args.num_images, args.seed, args.first_images)
    print(f'{coco_root(args.data)}: the first {len(found.val)} images of val2017, {len(found.train)} of train2017')


def print_table(args: argparse.Namespace) -> None:
    row = '{:<16} {:>14}  {:<30} {}'
    print(row.format('name', 'bytes', 'present', f'file in {checkpoint_root(args.root)}'))
    for checkpoint in CHECKPOINTS.values():
        size = f'{checkpoint.size:,}' if checkpoint.size else '?'
        print(row.format(checkpoint.name, size, checkpoint.status(args.root, args.verify), checkpoint.file_name))
    print(row.format('', '', '', f'folder in {coco_root(args.data)}'))
    for archive in ARCHIVES.values():
        print(row.format(archive.name, f'{archive.size:,}', archive.status(args.data), f'{archive.folder}/'))


def main() -> int:
    args = parse_args()
    exit_code = 0
    try:
        for job in jobs(args):
            try:
                job()
            except PTQSAMError as error:
                print(f'error: {error}', file=sys.stderr)
                exit_code = max(exit_code, error.exit_code)
        if args.list:
            print_table(args)
    except PTQSAMError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print('interrupted; what came is kept, the same command goes on from there', file=sys.stderr)
        return 130
    return exit_code


if __name__ == '__main__':
    sys.exit(main())
